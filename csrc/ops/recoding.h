// The checks of _recode_, and what the engine is given.
#pragma once
#include "../math/quantize.h"
#include "checks.h"

namespace fusedamp {

inline Recoding checked_recoding(const Tensor& source, const Tensor& target, const OptionalTensor& weight,
                                 const OptionalTensor& scales) {
  const char* op = "_recode_";
  std::vector<Span> spans;
  const auto place = [&](const char* name, const Tensor& t, DType dtype, bool written) {
    need_device(op, {name}, t, {"source"}, source);
    void* data = data_of(op, {name}, t);
    add_span(spans, written, {name}, t, data, size_of(dtype));
    return data;
  };
  const auto beside = [&](const char* name, const Tensor& t, DType dtype, bool written) {
    const auto got = t.sizes(), wanted = source.sizes();
    if (!std::equal(got.begin(), got.end(), wanted.begin(), wanted.end()))
      fail(op, name, " has shape ", list_text(got), "; expected ", list_text(wanted), ", like source");
    void* data = place(name, t, dtype, written);
    if (!same_layout(t, source))
      fail(op, name, " has strides ", list_text(t.strides()), "; expected ", list_text(source.strides()),
           ", like source (shape ", list_text(wanted), "). Copy it into torch.empty_like(source)");
    return data;
  };
  const auto expect = [&](bool good, const char* name, const Tensor& t, const char* wanted) {
    if (!good) fail(op, name, " is ", dtype_name(t), "; expected ", wanted);
  };
  // float32, and those of the three dtypes that only store.
  const auto stored = [](const Tensor& t) {
    const ScalarType got = t.scalar_type();
    return got == ScalarType::Char ? DType::i8 : got == ScalarType::Byte ? DType::u8 : DType::i16;
  };
  const auto is = [](const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype; };
  const auto is_8bit = [&](const Tensor& t) { return is(t, ScalarType::Char) || is(t, ScalarType::Byte); };

  Recoding job = {};
  job.numel = source.numel();
  const bool split = weight && is(target, ScalarType::Short), encoded = !weight && is_8bit(source);
  if (weight) {
    expect(is(*weight, ScalarType::Half) || is(*weight, ScalarType::BFloat16), "weight", *weight,
           "float16 or bfloat16");
    expect(is(source, ScalarType::Float) || (!split && is(source, ScalarType::Short)), "source", source,
           split ? "float32, to become a remainder" : "float32, or int16 for a split master");
    expect(split || is(target, ScalarType::Float), "target", target, "float32 or int16 beside a weight");
    if (scales) fail(op, "scales are given beside a weight; expected them for 8-bit states only");
    job.weight_dtype = dtype_of(op, {"weight"}, *weight);
  } else {
    expect(encoded ? is(target, ScalarType::Float) : is_8bit(target), "target", target,
           encoded ? "float32, as source is in 8 bits" : "int8 or uint8, as there is no weight");
    const int64_t blocks = (job.numel + kScaleBlock - 1) / kScaleBlock;
    if (!scales || !is(*scales, ScalarType::Float) || scales->dim() != 1 || scales->numel() != blocks)
      fail(op, "scales are ", scales ? dtype_name(*scales) + " of shape " + list_text(scales->sizes()) : "missing",
           "; expected float32 of shape [", blocks, "], one for each ", kScaleBlock, " elements of an 8-bit state");
  }
  const bool remainders = weight && is(source, ScalarType::Short);
  job.source_dtype = encoded || remainders ? stored(source) : dtype_of(op, {"source"}, source);
  job.target_dtype = is(target, ScalarType::Float) ? DType::f32 : stored(target);
  job.source = place("source", source, job.source_dtype, false);
  job.target = beside("target", target, job.target_dtype, true);
  if (weight) job.weight = beside("weight", *weight, job.weight_dtype, split);
  if (scales) job.scales = static_cast<float*>(place("scales", *scales, DType::f32, !encoded));
  need_own_memory(op, spans);
  return job;
}

}  // namespace fusedamp
