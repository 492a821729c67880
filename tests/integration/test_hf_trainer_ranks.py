"""The Hugging Face Trainer on 2 gloo ranks: accumulation, clipping, bitwise resume, LoRA."""

import tempfile
from functools import partial

import pytest
import torch
from fusedamp import optim
from ranks import spawned
from trainers import LR, STEPS, WHY, Model, as_torchrun, close, equal, rows, weights

pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("accelerate", reason=WHY)
pytestmark = [pytest.mark.integration, pytest.mark.host, pytest.mark.filterwarnings("ignore")]
FP32, BF16 = torch.float32, torch.bfloat16
FORMATS = {
    "fp32": (FP32, {}),
    "fp32, int8": (FP32, {"state_dtype": "int8", "rounding_seed": 3}),
    "bf16, split, int8": (
        BF16,
        {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3},
    ),
    "bf16, rounded": (BF16, {"master_weights": "none", "stochastic_rounding": True, "rounding_seed": 3}),
}


def model_of(dtype, lora):
    model = Model(dtype)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        model = inject_adapter_in_model(config, model).to(dtype)
    return model


def train(folder, cls, dtype=FP32, options=None, lora=False, **resume):
    import transformers
    from accelerate.state import AcceleratorState

    as_torchrun()
    AcceleratorState._reset_state(True)
    x, y = rows()
    trainer = transformers.Trainer(
        model_of(dtype, lora),
        transformers.TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=LR,
            max_grad_norm=1.0,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        optimizer_cls_and_kwargs=(cls, {"lr": LR, "weight_decay": 0.1, **(options or {})}),
    )
    before = weights(trainer.model)
    trainer.train(**resume)
    after = weights(trainer.model)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [p.requires_grad for p in trainer.model.parameters()]
    return after


def shared_folder():
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    return folder[0]


def as_torch():
    close(*(train(shared_folder(), cls) for cls in (optim.AdamW, torch.optim.AdamW)))


def resumes(dtype, options, lora):
    folder = shared_folder()
    run = partial(train, folder, optim.AdamW, dtype, options, lora)
    straight = run()
    equal(run(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}"), straight)


def with_lora(dtype, options):
    pytest.importorskip("peft", reason=WHY)
    resumes(dtype, options, True)


SCENARIOS = {
    2: {"as torch": as_torch}
    | {f"resumes, {form}": partial(resumes, *FORMATS[form], False) for form in FORMATS}
    | {f"lora, {form}": partial(with_lora, *FORMATS[form]) for form in ("fp32", "bf16, split, int8")}
}
ranks, test_on_ranks = spawned(SCENARIOS)
