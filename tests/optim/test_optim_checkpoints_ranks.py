"""Checkpoints of torch.distributed.checkpoint, saved on n gloo ranks and loaded on m: loaded values and later
steps have the bits of one process that never stopped, in every format.
"""

import tempfile
from functools import partial

import pytest
import torch
from cases import BY_NAME
from ranks import needs_gloo, resized, spawned
from sharded_net import FORMATS, REPLICATED, network, same_states, sharded, train

dist = torch.distributed
pytestmark = needs_gloo
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Trained:
    """A net with its optimizer and a twin in one process; ``place`` shards the net, or returns it whole."""

    def __init__(self, place, case, dtype, options):
        self.net, self.twin = place(dtype), network(dtype)
        make = partial(BY_NAME[case].ours, lr=0.1, **options)
        self.optimizer, self.expected = make(self.net.parameters()), make(self.twin.parameters())

    def train(self, seeds):
        train(self.net, self.optimizer, seeds)
        train(self.twin, self.expected, seeds)

    def check(self):
        same_states(self.net, self.optimizer, self.twin, self.expected)

    def state(self, flat):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = get_state_dict(self.net, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder, flat):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        saved = self.state(flat)
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=StateDictOptions(flatten_optimizer_state_dict=flat),
        )


def shared_folder():
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def loads(folder, flat, sizes, make):
    """On each number of ranks: the values of step 3, and the bits of steps 4 to 6."""
    for size in sizes:
        with resized(size) as here:
            if here:
                again = make(sharded if size > 1 else network)
                train(again.twin, again.expected, range(3))
                again.load(folder, flat)
                again.check()
                again.train(range(3, 6))
                again.check()


def saved_on_all(case, dtype, options, flat, sizes, place=sharded):
    import torch.distributed.checkpoint as dcp

    make = partial(Trained, case=case, dtype=dtype, options=options)
    folder, trained = shared_folder(), make(place)
    trained.train(range(3))
    dcp.save(trained.state(flat), checkpoint_id=folder)
    loads(folder, flat, sizes, make if place is sharded else lambda _: make(place))


def saved_on_one(case, dtype, options, flat):
    """One process's plain tensors load into shards."""
    import torch.distributed.checkpoint as dcp

    make = partial(Trained, case=case, dtype=dtype, options=options)
    folder = shared_folder()
    with resized(1) as here:
        if here:
            trained = make(network)
            trained.train(range(3))
            dcp.save(trained.state(flat), checkpoint_id=folder)
    loads(folder, flat, (dist.get_world_size(),), make)


def saved_while_training(dtype, options):
    """async_save has the values of its step, while the next steps change them."""
    import torch.distributed.checkpoint as dcp

    make = partial(Trained, case="adamw", dtype=dtype, options=options)
    folder, trained = shared_folder(), make(sharded)
    trained.train(range(3))
    saving = dcp.async_save(
        trained.state(False), checkpoint_id=folder, process_group=dist.new_group(backend="gloo")
    )
    trained.train(range(3, 6))
    saving.result()
    trained.check()
    loads(folder, False, (dist.get_world_size(), 1), make)


def other_format():
    """What was saved loads into an optimizer with the same options, whose state dict loads into any other."""
    import torch.distributed.checkpoint as dcp

    folder = shared_folder()
    trained = Trained(sharded, "adamw", BF16, FORMATS["split, bf16"])
    trained.train(range(3))
    dcp.save(trained.state(False), checkpoint_id=folder)
    with resized(2) as here:
        if not here:
            return
        again = Trained(sharded, "adamw", BF16, FORMATS["fp32"])
        with pytest.raises(
            dcp.api.CheckpointException, match=r"(?s)Size mismatch .*state\.0\.weight\.master"
        ):
            again.load(folder, False)
        same = Trained(sharded, "adamw", BF16, FORMATS["split, bf16"])
        same.load(folder, False)
        with torch.no_grad():
            for p, q in zip(again.net.parameters(), same.net.parameters(), strict=True):
                p.copy_(q)
        again.optimizer.load_state_dict(same.optimizer.state_dict())
        again.twin.load_state_dict(trained.twin.state_dict())
        again.expected.load_state_dict(trained.expected.state_dict())
        again.check()
        again.train(range(3, 6))
        again.check()


def eight_bits_elsewhere():
    """Shards whose boundaries cut blocks save floats, and whole tensors quantized values: neither is taken
    for the other."""
    import torch.distributed.checkpoint as dcp

    make = partial(Trained, case="adamw", dtype=BF16, options=REPLICATED["split, int8"])
    whole, shards = shared_folder(), shared_folder()
    trained = make(sharded)
    train(trained.net, trained.optimizer, range(3))
    dcp.save(trained.state(False), checkpoint_id=shards)
    with resized(1) as here:
        if here:
            one = make(network)
            train(one.net, one.optimizer, range(3))
            dcp.save(one.state(False), checkpoint_id=whole)
            with pytest.raises(dcp.api.CheckpointException, match=r"(?s)Missing key .*exp_avg_scale"):
                make(network).load(shards, False)
    with pytest.raises(ValueError, match=r"'exp_avg' of dtype torch.float32, which was saved in 8 bits"):
        make(sharded).load(whole, False)
    again = make(sharded)
    again.load(shards, False)
    for one in (trained, again):
        train(one.net, one.optimizer, range(3, 6))
    for p, q in zip(trained.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())


FORMS = {
    "fp32 weights": (FP32, FORMATS["fp32"]),
    "fp32 masters": (BF16, FORMATS["fp32"]),
    "fp16 split": (FP16, FORMATS["split"]),
    "split": (BF16, FORMATS["split"]),
    "split, bf16": (BF16, FORMATS["split, bf16"]),
    "none, rounded": (BF16, FORMATS["none, rounded"]),
}
INT8 = (BF16, REPLICATED["split, int8"])
SCENARIOS = {
    4: {form: partial(saved_on_all, "adamw", *FORMS[form], False, (4, 2, 1)) for form in FORMS}
    | {
        "flattened": partial(saved_on_all, "adamw", *FORMS["split, bf16"], True, (4, 2, 1)),
        "sgd": partial(saved_on_all, "sgd-nesterov", *FORMS["split, bf16"], True, (4, 1)),
        "replicated, nested": partial(saved_on_all, "adamw", *INT8, False, (4, 2, 1), network),
        "replicated, flattened": partial(saved_on_all, "adamw", *INT8, True, (2,), network),
        "async": partial(saved_while_training, *FORMS["split, bf16"]),
        "async, rounded": partial(saved_while_training, *FORMS["none, rounded"]),
        "other format": other_format,
        "8 bits elsewhere": eight_bits_elsewhere,
    },
    2: {f"from one, {form}": partial(saved_on_one, "adamw", *FORMS[form], True) for form in FORMS},
}
ranks, test_on_ranks = spawned(SCENARIOS)
