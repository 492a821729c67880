// Trains handwritten digits with FP16 weights: FP32 masters, loss scale, clipping, a schedule of the learning rate, and
// a checkpoint, from which C++ and Python continue with the same bits. docs/cpp.md tells how to build it.
//
//   train EPOCHS [CHECKPOINT [DIGITS]]
//
// If the file CHECKPOINT exists, training resumes from it. DIGITS is a file with the images, by default digits.pt:
//
//   pip install scikit-learn
//   python -c "import torch; from sklearn.datasets import load_digits; digits = load_digits(); torch.save(
//     {'images': torch.tensor(digits.data).float() / 16, 'labels': torch.tensor(digits.target)}, 'digits.pt')"
#include <fusedamp/fusedamp.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>

namespace F = torch::nn::functional;
using Weights = c10::Dict<std::string, torch::Tensor>;  // the entries of a module's state_dict() in Python

constexpr int64_t kTraining = 1500, kBatch = 50;  // of 1,797 images; the others measure the accuracy

// The parameters, and whatever else a module saves, by name.
Weights state_dict(const torch::nn::Module& module) {
  Weights weights;
  for (const auto& item : module.named_parameters()) weights.insert(item.key(), item.value().detach());
  for (const auto& item : module.named_buffers()) weights.insert(item.key(), item.value());
  return weights;
}

void load_state_dict(torch::nn::Module& module, const c10::impl::GenericDict& saved) {
  for (const auto& item : state_dict(module)) item.value().copy_(saved.at(item.key()).toTensor());
}

// What a checkpoint and the images are.
c10::impl::GenericDict read(const std::string& path, torch::Device device) {
  return fusedamp::load(path, device).toGenericDict();
}

int main(int count, char** arguments) {
  const int64_t epochs = count > 1 ? std::stoll(arguments[1]) : 5;
  const std::string checkpoint = count > 2 ? arguments[2] : "";
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);

  const auto digits = read(count > 3 ? arguments[3] : "digits.pt", device);
  const torch::Tensor images = digits.at("images").toTensor().to(torch::kHalf);
  const torch::Tensor labels = digits.at("labels").toTensor();

  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(64, 128), torch::nn::GELU(), torch::nn::Linear(128, 10));
  model->to(device, torch::kHalf);
  // The optimizer keeps FP32 master weights of FP16 parameters, and saves them.
  fusedamp::optim::AdamW optimizer(model->parameters(), fusedamp::optim::AdamWOptions(5e-3).weight_decay(0.05));
  fusedamp::GradScaler scaler(fusedamp::GradScalerOptions().growth_interval(20));  // the default is for long runs
  int64_t done = 0;

  if (!checkpoint.empty() && std::filesystem::exists(checkpoint)) {
    const auto saved = read(checkpoint, device);
    load_state_dict(*model, saved.at("model").toGenericDict());
    optimizer.load_state_dict(saved.at("optimizer"));
    scaler.load_state_dict(saved.at("scaler"));
    done = saved.at("epochs").toInt();
  }

  for (const int64_t end = done + epochs; done < end;) {
    for (auto& group : optimizer.param_groups()) group.options().set_lr(5e-3 * std::pow(0.9, done));
    torch::manual_seed(done);
    torch::Tensor loss_sum = torch::zeros({}, device), skips = torch::zeros({}, device);
    for (const torch::Tensor& batch : torch::randperm(kTraining).to(device).split(kBatch)) {
      optimizer.zero_grad();
      const torch::Tensor outputs = model->forward(images.index_select(0, batch)).to(torch::kFloat);
      const torch::Tensor loss = F::cross_entropy(outputs, labels.index_select(0, batch));
      scaler.scale(loss).backward();
      scaler.clip_grad_norm_(optimizer, 1.0);  // the step clips; nothing waits for the device
      scaler.step(optimizer);                  // does nothing if a gradient is inf or NaN
      scaler.update();
      loss_sum += loss.detach();
      skips += scaler.last_step_skipped();
    }
    ++done;
    const torch::NoGradGuard no_grad;
    const torch::Tensor guesses = model->forward(images.slice(0, kTraining)).argmax(1);
    const torch::Tensor right = guesses.eq(labels.slice(0, kTraining)).to(torch::kFloat).mean();
    std::printf("epoch %d  loss %.4f  accuracy %.3f  scale %.0f  skipped %.0f\n", static_cast<int>(done),
                loss_sum.item<double>() * kBatch / kTraining, right.item<double>(), scaler.get_scale(),
                skips.item<double>());
  }

  if (checkpoint.empty()) return 0;
  c10::impl::GenericDict saved(c10::StringType::get(), c10::AnyType::get());
  saved.insert("model", state_dict(*model));
  saved.insert("optimizer", optimizer.state_dict());
  saved.insert("scaler", scaler.state_dict());
  saved.insert("epochs", done);
  fusedamp::save(saved, checkpoint);  // torch.load(checkpoint, weights_only=True) reads it
}
