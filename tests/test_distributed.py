"""More than one process: DDP, FSDP2 by function and by module, calibration, saving. Two gloo processes on the CPU against one."""

import gc
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lora_lite as ll
from cases import FIVE, TOLERANCE, assert_trees_equal, move, tiny_models
from quantised_models import facts, twins
from quantised_models import same as unchanged
from two_processes import PATIENCE, run_jobs

STEPS = 3
CONFIGS = (
    *FIVE,
    ll.VeRAConfig(r=8),
    ll.OFTConfig(block_size=8),
    ll.LNTuningConfig(),
    ll.LoReFTConfig(r=4),
    ll.FullConfig(target_names=r"(norm|layers\.1)$"),
)


class Count:
    """A statistic that one process can gather and several cannot merge."""

    def __init__(self, count=0):
        self.count = count

    def add(self, x):
        return Count(self.count + len(x))


@dataclass(frozen=True, kw_only=True)
class Counting(ll.AdapterConfig):
    name: ClassVar[str] = "counting"
    calibrated: ClassVar[bool] = True
    statistic: ClassVar[type] = Count

    def init(self, W, generator, stats=None):
        return {"g": torch.zeros(W.out_features)}, {}

    def forward(self, params, W, x):
        return W(x) + params["g"]


def whole_model(**overrides):
    # Tied, with a vocabulary that two processes cannot halve: what sharding has to look after.
    return tiny_models["llama"](tie_word_embeddings=True, vocab_size=65, **overrides)[0].eval()


def batch_for(rank=None):
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return {"input_ids": ids[rows], "labels": ids[rows]}


def start(cfg=FIVE[0], **options):
    model = whole_model()
    adapt = ll.build(model, cfg, **options)
    return model, adapt, move(adapt.init())


def mesh():
    return init_device_mesh("cpu", (2,))


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def optimiser(leaves):
    return torch.optim.SGD(leaves, lr=0.5, momentum=0.9)


def train_tree(adapt, params, batch, average=lambda grads: grads):
    """Return the first gradients, averaged, and the params after some steps."""
    leaves = ll.tree_leaves(params)
    stepper, step, first = optimiser(leaves), ll.value_and_grad(lambda p: adapt(p, batch).loss), None
    for _ in range(STEPS):
        grads = average(step(params)[1])
        first = first or grads
        ll.set_grads(params, grads)
        stepper.step()
    return first, params


def train_module(adapt, module, batch):
    stepper = optimiser([p for p in module.parameters() if p.requires_grad])
    for _ in range(STEPS):
        stepper.zero_grad()
        module(**batch).loss.backward()
        stepper.step()
    return adapt.params(module)


# The jobs: each runs in both processes and gives what the tests look at.


def ddp(rank):
    model, adapt, params = start()
    before = weights_of(model)
    trained = train_module(adapt, torch.nn.parallel.DistributedDataParallel(adapt.module(params)), batch_for(rank))
    return trained, all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def _asleep(sharded):
    weights = [p for name, p in sharded._replicas.main.module.named_parameters() if ".adapter." not in name]
    return all(isinstance(p, DTensor) for p in weights)


def fsdp_by_function(rank):
    model, adapt, params = start()
    before = weights_of(model)
    sharded = adapt.shard(mesh())
    grads, trained = train_tree(sharded, params, batch_for(rank), ll.all_reduce_mean)
    held = sum(p.to_local().numel() for p in sharded._plan.base.parameters())
    asleep = [_asleep(sharded)]
    with torch.no_grad():
        sharded(params, batch_for(rank))
    asleep.append(_asleep(sharded))  # the root too, whose weights no backward gives back here
    untouched = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shared = any(p.to_local().untyped_storage().data_ptr() in ours for p in sharded._plan.base.parameters())
    return grads, trained, held, asleep, untouched, shared


def parts_are_held_once(rank):
    sharded = start()[1].shard(mesh())
    clones = [replicas.main.module for replicas in (sharded._replicas,)]
    clones.append(sharded.train()._replicas.main.module)
    names = [name for name, p in clones[0].named_parameters() if ".adapter." not in name]
    return [[clone.get_parameter(name).to_local().data_ptr() for name in names] for clone in clones]


def fsdp_by_module(rank):
    model, adapt, params = start()
    before = weights_of(model)
    module = adapt.module(params)
    for block in (*module.model.layers, module):
        fully_shard(block, mesh=mesh())
    trained = train_module(adapt, module, batch_for(rank))
    return trained, all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def variants(rank):
    errors = {}
    for cfg in CONFIGS:
        _, adapt, params = start(cfg)
        sharded = adapt.shard(mesh())
        assert_trees_equal(sharded.init(seed=3), adapt.init(seed=3))
        got, want = (ll.value_and_grad(lambda p, a=a: a(p, batch_for(rank)).loss)(params) for a in (sharded, adapt))
        assert torch.equal(got[0], want[0]), cfg
        assert_trees_equal(got[1], want[1], 1e-6)
        errors[cfg.name] = float((adapt(params, batch_for(rank)).logits - adapt.base(batch_for(rank)).logits).abs().max())
    return errors


def _calls(adapt):
    """Return the calls that a sharded adapt supports, as `{name: f(params, batch)}`."""

    def loss(p, batch):
        return adapt(p, batch).loss

    def by_row(output, batch):
        return output.logits.square().flatten(1).mean(1)

    def preference(p, batch):  # two graphs alive at once, with the reference between them
        chosen = adapt(p, batch).logits.square().mean()
        with torch.no_grad():
            reference = adapt.base(batch).logits.std()
        return chosen * reference - adapt(p, {"input_ids": batch["input_ids"].flip(1)}).logits.square().mean()

    return {
        "base": lambda p, b: adapt.base(b).logits,
        "mixed": lambda p, b: adapt.mixed(ll.stack([p, adapt.init(seed=1)]), b, index=[1, 0]).logits,
        "per_example_grad": lambda p, b: ll.per_example_grad(adapt, by_row)(p, b),
        "two graphs": lambda p, b: ll.value_and_grad(preference)(p, b)[1],
        "no_grad": lambda p, b: torch.no_grad()(adapt)(p, b).logits,
        "func.grad": lambda p, b: torch.func.grad(loss)(p, b),
        "jvp": lambda p, b: torch.func.jvp(lambda p: loss(p, b), (p,), (p,)),
        "vmap of grad": lambda p, b: torch.vmap(torch.func.grad(loss), (0, None))(ll.stack([p, adapt.init(seed=1)]), b),
        "jacrev": lambda p, b: torch.func.jacrev(lambda p: adapt(p, b).logits[0, -1, :2])(p),
        "hvp": lambda p, b: ll.hvp(lambda p: loss(p, b))(p, p),
        "train": lambda p, b: ll.value_and_grad(lambda p: adapt.train()(p, b).loss)(p)[1],
    }


def transforms(rank):
    model = whole_model(attn_implementation="eager")
    found = {}
    for remat in (None, r"layers\.\d+$"):
        adapt = ll.build(model, FIVE[0], remat=remat)
        params, batch = move(adapt.init()), batch_for(rank)
        sharded = _calls(adapt.shard(mesh()))
        for name, call in _calls(adapt).items():
            want = call(params, batch)
            for time in ("first", "again"):  # what a call leaves behind must not spoil the next
                got = sharded[name](params, batch)
                pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want))
                found[name, bool(remat), time] = max(float((g - w).abs().max()) / max(1.0, float(w.abs().max())) for g, w in pairs)
    return found


def quantised(rank):
    """A base in 4 or 8 bits, by function and by module, beside one process with all rows."""
    return {backend: _quantised(rank, backend) for backend in ("nf4", "nf4-nested", "8-bit")}


def _quantised(rank, backend):
    model = twins(whole_model(num_hidden_layers=1), backend)[0]
    before, begun = facts(model), _packed_bytes()
    adapt = ll.build(model, FIVE[0])
    params = move(adapt.init())
    grads, want = train_tree(adapt, ll.tree_map(torch.clone, params), batch_for())
    sharded = adapt.shard(mesh())
    first, by_function = train_tree(sharded, ll.tree_map(torch.clone, params), batch_for(rank), ll.all_reduce_mean)
    mixed = [a.mixed(ll.stack([params, want]), batch_for(rank), [0, 1]).logits for a in (sharded, adapt)]
    module = adapt.module(params)
    for block in (*module.model.layers, module):
        fully_shard(block, mesh=mesh())
    by_module = train_module(adapt, module, batch_for(rank))
    untouched = unchanged(before, facts(model))
    del model, adapt, before
    alive = [_packed_bytes()]
    del sharded
    alive.append(_packed_bytes())
    del module, block
    pairs = [(first, grads), (by_function, want), (by_module, want)]
    differences = [max(float((a - b).abs().max()) for a, b in zip(*map(ll.tree_leaves, pair))) for pair in pairs]
    return [*differences, float((mixed[0] - mixed[1]).abs().max())], untouched, begun, alive, _packed_bytes()


def uneven(rank):
    """Three processes, which divide no width of the model: by function on bases of three sorts, beside one process with all rows."""
    return {backend: _uneven(rank, backend) for backend in ("dense", "nf4", "8-bit")}


def _uneven(rank, backend):
    model = whole_model(num_hidden_layers=1)
    model = model if backend == "dense" else twins(model, backend)[0]
    adapt = ll.build(model, FIVE[0])
    params, whole = move(adapt.init()), batch_for()
    three, own = ({name: ids[rows] for name, ids in whole.items()} for rows in (slice(3), slice(rank, rank + 1)))
    want = ll.value_and_grad(lambda p: adapt(p, three).loss)(params)[1]
    sharded = adapt.shard(init_device_mesh("cpu", (3,)))
    grads = ll.all_reduce_mean(ll.value_and_grad(lambda p: sharded(p, own).loss)(params)[1])
    mixed = [a.mixed(ll.stack([params, want]), whole, [0, 1, 1, 0]).logits for a in (sharded, adapt)]
    differences = [float((a - b).abs().max()) for a, b in zip(ll.tree_leaves(grads), ll.tree_leaves(want))]
    return max(differences), float((mixed[0] - mixed[1]).abs().max())


def _packed_bytes():
    """Count the bytes of packed weights and scales that are alive in this process, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), DTensor) and not o.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dtype in (torch.uint8, torch.int8)}
    return sum(storages.values())


class Turned(torch.nn.Module):
    """Two layers, of which the second sees the batch in another form; it may refuse a single row."""

    def __init__(self, fixed=False):
        super().__init__()
        self.fixed, self.first, self.second = fixed, torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x, form="flat"):
        x = self.first(x).tanh()
        if self.fixed and len(x) != 2:
            raise RuntimeError("two rows, or none")
        if form == "flat":
            return self.second(x.flatten(0, 1)).view_as(x)
        return self.second(x.transpose(0, 1)).transpose(0, 1) if form == "time first" else self.second(x)


def rows(rank):
    """Mixed calls in which the processes differ in what they know and in what they ask."""
    return {training: _rows(rank, training) for training in (False, True)}


def _rows(rank, training):
    adapt = ll.build(Turned().train(training), FIVE[0])
    sharded = adapt.shard(mesh(), "first|second")
    stacked, x = ll.stack([move(adapt.init(), seed=k) for k in range(2)]), torch.randn(4, 5, 6)

    def gradient(a, x, index, form):
        return ll.value_and_grad(lambda p: a.mixed(p, x, index, form=form).square().sum())(stacked)[1]

    def differ(x, index, form="flat"):
        pairs = zip(*(ll.tree_leaves(gradient(a, x, index, form)) for a in (sharded, adapt)))
        return max(float((g - w).abs().max()) for g, w in pairs)

    differences = [
        differ(x[: 3 + rank, : 4 + rank], [0, 1, 1, 0][: 3 + rank]),  # other rows, other lengths
        differ(x[:2, :4] if rank else x[:2, :3], [0, 1]),  # one has seen the length, the other has not
        differ(x[: 2 - rank, :2], [0, 1][: 2 - rank]),  # one row has nothing to be followed
        differ(x[:3, :4], [1, 0, 1], ("flat", "as it is")[rank]),
    ]
    form = ("flat", "time first")[rank]
    refused = [_message(lambda: sharded.mixed(stacked, x[:2], [0, 1], form=form)) for _ in range(2)]  # by both, and again
    fixed = ll.build(Turned(fixed=True), FIVE[0])
    sharded = fixed.shard(mesh(), "first|second")
    untried = _message(lambda: sharded.mixed(stacked, x[:2], [0, 1]))
    same = [a.mixed(stacked, x[:2], [0, 1], form="as it is") for a in (fixed, sharded)]
    return [*differences, float((same[0] - same[1]).abs().max())], refused, untried


class Packed(torch.nn.Parameter):
    """A class of weights that no kind reads."""


def refusals(rank):
    _, adapt, params = start()
    sharded, batch = adapt.shard(mesh()), batch_for(rank)
    loss = lambda p: sharded(p, batch).loss  # noqa: E731
    norm = lambda p: sum(g.square().sum() for g in ll.tree_leaves(torch.func.grad(loss)(p)))  # noqa: E731

    def in_thread():
        failed = []

        def call():
            try:
                sharded(params, batch)
            except RuntimeError as e:
                failed.append(e)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        raise failed[0]

    unread = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    unread[1].register_parameter("packed", Packed(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    refused = {
        "reverse twice": lambda: torch.func.grad(norm)(params),
        "compile": lambda: torch.compile(loss, backend="eager", fullgraph=True)(params),
        "thread": in_thread,
        "merge": lambda: sharded.merge(params),
        "module": lambda: sharded.module(params),
        "to_lora": lambda: ll.to_lora(sharded, params, r=2),
        "shard": lambda: sharded.shard(mesh()),
        "blocks": lambda: adapt.shard(mesh(), blocks=r"layer\.\d+$"),
        "pattern": lambda: adapt.shard(mesh(), blocks="("),
        "mesh": lambda: adapt.shard(2),
        "mesh axes": lambda: adapt.shard(init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))),
        "packed": lambda: ll.build(unread, ll.LoRAConfig(target_names="0")).shard(mesh(), blocks="1"),
        "not mergeable": lambda: start(Counting(), calibration=_calibration(), group=dist.group.WORLD),
        "not floating": lambda: ll.all_reduce_mean({"n": torch.tensor(3)}),
        "in a transform": lambda: torch.func.grad(lambda x: ll.all_reduce_mean(x).sum())(torch.ones(2)),
    }
    return {name: _message(call) for name, call in refused.items()}


def _message(call):
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


def calibration(rank):
    _, adapt, _ = start(ll.EVAConfig(r=4), calibration=_calibration(rank), group=dist.group.WORLD)
    return adapt.init(), adapt.constants


def saving(rank):
    _, adapt, params = start(FIVE[2])
    sharded = adapt.shard(mesh())
    if rank == 0:
        ll.save(sharded, params, "adapter.safetensors")
    dist.barrier()
    loaded, again = ll.load(whole_model(), "adapter.safetensors")
    assert_trees_equal(again, params)
    return torch.equal(loaded.shard(mesh())(again, batch_for(rank)).logits, adapt(params, batch_for(rank)).logits)


def _calibration(rank=None):
    g = torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.randint(3, 64, (2, 9), generator=g)} for _ in range(5)]
    return batches if rank is None else batches[:2] if rank == 0 else batches[2:]


def calibration_by_gradients(rank):
    batches = [{**batch, "labels": batch["input_ids"]} for batch in _calibration(rank)]
    return start(ll.LoRAGAConfig(r=4), calibration=batches, group=dist.group.WORLD)[1].constants


def calibration_of_one_process(rank):
    """Rank 1 has nothing, so there all layers hold the one empty statistic."""
    return start(ll.EVAConfig(r=4), calibration=_calibration() if rank == 0 else [], group=dist.group.WORLD)[1].constants


def collectives(rank):
    counted, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (counted.append(1), reduce(*args, **kwargs))
    try:
        wide = torch.full((2, 3), 1.0 + rank, dtype=torch.float64)
        tree = {"a": {"A": wide, "B": torch.full((), 4.0 * rank)}, "b": (torch.full((1,), 2.0 * rank, dtype=torch.bfloat16),)}
        return ll.all_reduce_mean(tree), len(counted), wide
    finally:
        dist.all_reduce = reduce


JOBS = {
    job.__name__: job
    for job in (
        ddp,
        fsdp_by_function,
        parts_are_held_once,
        fsdp_by_module,
        variants,
        transforms,
        rows,
        quantised,
        refusals,
        saving,
        calibration,
        calibration_by_gradients,
        calibration_of_one_process,
        collectives,
    )
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_jobs(JOBS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def of(outcomes):
    """Return a job's results in each of the two processes."""

    def values(job):
        for rank, (well, value) in enumerate(outcomes[job.__name__]):
            assert well, f"rank {rank}:\n{value}"
        return [value for _, value in outcomes[job.__name__]]

    return values


@pytest.fixture(scope="module")
def one_process():
    _, adapt, params = start()
    begun = ll.tree_map(torch.clone, params)
    grads, trained = train_tree(adapt, params, batch_for())
    assert max(float((a - b).abs().max()) for a, b in zip(ll.tree_leaves(trained), ll.tree_leaves(begun))) > 1e-2, "nothing was trained"
    return grads, trained


def test_ddp_trains_what_one_process_trains(of, one_process):
    for trained, untouched in of(ddp):
        assert_trees_equal(trained, one_process[1], 1e-6)
        assert untouched


def test_fsdp_by_function_gives_the_gradients_of_one_process(of, one_process):
    for grads, *_ in of(fsdp_by_function):
        assert_trees_equal(grads, one_process[0], 1e-6)


def test_fsdp_by_function_trains_what_one_process_trains(of, one_process):
    for _, trained, *_ in of(fsdp_by_function):
        assert_trees_equal(trained, one_process[1], 1e-6)


def test_processes_train_the_same_to_the_bit(of):
    (_, first, *_), (_, second, *_) = of(fsdp_by_function)
    assert_trees_equal(first, second)


def test_each_process_holds_half_of_the_base(of):
    total = sum(p.numel() for p in whole_model().parameters())
    halves = [held for _, _, held, *_ in of(fsdp_by_function)]
    assert sum(halves) == total
    assert max(halves) < 0.51 * total


def test_weights_are_given_back_after_a_step_and_after_a_forward(of):
    assert [asleep for _, _, _, asleep, *_ in of(fsdp_by_function)] == [[True, True]] * 2


def test_sharding_leaves_the_model_alone(of):
    for *_, untouched, shared in of(fsdp_by_function):
        assert untouched
        assert not shared


def test_parts_are_held_once_by_all_clones(of):
    for places in of(parts_are_held_once):
        assert all(clone == places[0] for clone in places[1:])


def test_fsdp_by_module_trains_what_one_process_trains(of, one_process):
    for trained, untouched in of(fsdp_by_module):
        assert_trees_equal(trained, one_process[1], 1e-6)
        assert untouched


def test_sharded_variants_equal_whole_ones(of):
    for errors in of(variants):
        assert len(errors) == len(CONFIGS)
        assert min(errors.values()) > 1e-4, "a variant that does nothing proves nothing"


def test_calls_and_transforms_of_a_sharded_adapt_are_exact(of):
    for found in of(transforms):
        assert len(found) == 2 * 2 * len(_calls(None))
        assert {key: error for key, error in found.items() if error > TOLERANCE[torch.float32]} == {}


def test_quantised_bases_train_what_one_process_trains_on_half_of_the_base_each(of):
    for found in of(quantised):
        for differences, untouched, begun, alive, left in found.values():
            assert max(differences) < 1e-6
            assert untouched
            both, of_module = alive
            assert max(both - of_module, of_module) < 0.52 * begun
            assert left < 0.02 * begun


def test_parts_of_three_processes_may_be_uneven(tmp_path):
    for well, found in run_jobs({"uneven": uneven}, tmp_path, count=3)["uneven"]:
        assert well, found
        for differences in found.values():
            assert max(differences) < 1e-6


def test_processes_try_the_rows_of_all_their_batches_together(of):
    for found in of(rows):
        for differences, refused, untried in found.values():
            assert max(differences) < 1e-5
            for message in refused:
                assert 'ValueError: adapt.mixed: at "second" expected an input whose first axis is made of the batch' in message
            assert 'at "second" expected an input with a multiple of 2 rows whose order is known' in untried


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reverse twice", ("RuntimeError: adapt: expected at most one reverse-mode transform", "found more", "ll.hvp")),
        ("compile", ("expected at most one reverse-mode transform and no torch.compile",)),
        ("thread", ("RuntimeError: adapt: expected a sharded adapt to be called in the thread", "found another", "one thread")),
        ("merge", ("ValueError: adapt.merge: expected whole weights", "found a base that is sharded", "the params fit both")),
        ("module", ("ValueError: adapt.module: expected whole weights",)),
        ("to_lora", ("ValueError: adapt.to_lora: expected whole weights",)),
        ("shard", ("ValueError: adapt.shard: expected whole weights",)),
        ("blocks", ('ValueError: shard: expected blocks="layer', "found none", "Closest: ", "layers.0")),
        ("pattern", ("ValueError: shard: expected blocks as a regular expression", "found '('")),
        ("mesh", ("TypeError: shard: expected mesh as a DeviceMesh, found int", "init_device_mesh")),
        ("mesh axes", ("ValueError: shard: expected a mesh of one axis, found 2",)),
        ("packed", ("ValueError: shard: expected plain weights", '"1.packed"', "distribute(layer, device)")),
        ("not mergeable", ("ValueError: build: expected statistics with merge(other)", 'found none in "Count"', "leave group out")),
        ("not floating", ("TypeError: all_reduce_mean: expected floating tensors, found torch.int64",)),
        ("in a transform", ("RuntimeError: all_reduce_mean: expected plain tensors", "what the transform returns")),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_a_sharded_adapt_refuses(of, name, words):
    for messages in of(refusals):
        assert all(word in messages[name] for word in words), messages[name]


def test_what_one_process_saves_all_load(of):
    assert of(saving) == [True, True]


def test_calibration_over_processes_is_that_of_all_batches(of):
    _, adapt, _ = start(ll.EVAConfig(r=4), calibration=_calibration())
    alone = start(ll.EVAConfig(r=4), calibration=_calibration(0))[1]
    params, constants = of(calibration)[0]
    assert max(float((a - b).abs().max()) for a, b in zip(ll.tree_leaves(alone.constants), ll.tree_leaves(constants))) > 1e-2
    assert_trees_equal(params, adapt.init(), 1e-4)  # directions of a decomposition: rounding moves them more than what they are made of
    assert_trees_equal(constants, adapt.constants, 1e-4)


def test_gradients_over_processes_are_those_of_all_batches(of):
    batches = [{**batch, "labels": batch["input_ids"]} for batch in _calibration()]
    _, adapt, _ = start(ll.LoRAGAConfig(r=4), calibration=batches)
    first, second = of(calibration_by_gradients)
    assert_trees_equal(first, second)
    assert_trees_equal(first, adapt.constants, 1e-3)


def test_calibration_over_processes_is_the_same_in_each(of):
    (_, first), (_, second) = of(calibration)
    assert_trees_equal(first, second)


def test_a_process_may_have_no_calibration_data(of):
    _, adapt, _ = start(ll.EVAConfig(r=4), calibration=_calibration())
    for constants in of(calibration_of_one_process):
        assert_trees_equal(constants, adapt.constants)


def test_average_is_one_collective_and_keeps_dtypes(of):
    for rank, (mean, collectives_, given) in enumerate(of(collectives)):
        assert collectives_ == 1
        assert torch.equal(mean["a"]["A"], torch.full((2, 3), 1.5, dtype=torch.float64))
        assert torch.equal(mean["a"]["B"], torch.tensor(2.0))
        assert torch.equal(mean["b"][0], torch.ones(1, dtype=torch.bfloat16))
        assert torch.equal(given, torch.full((2, 3), 1.0 + rank, dtype=torch.float64)), "what was given is not written to"


def test_script_of_the_documentation_runs_under_torchrun(tmp_path):
    """The loss that two processes report is the one that a process alone reaches on the same rows."""
    script = Path(__file__).parent.parent / "docs" / "examples" / "train_sharded.py"
    losses = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        file = tmp_path / f"{processes}.safetensors"
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, env=settings, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        losses.append(float(done.stdout.split()[-1]))
        torch.manual_seed(0)
        params = ll.load(tiny_models["llama"]()[0], file)[1]
        assert sum(leaf.numel() for leaf in ll.tree_leaves(params)) > 1000
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


def test_average_without_a_group_is_an_error():
    with pytest.raises(RuntimeError, match=r"all_reduce_mean: expected an initialised process group, found none.*init_process_group"):
        ll.all_reduce_mean({})


@pytest.mark.parametrize("cls", [ll.Statistics, type(ll.Statistics()).__mro__[1]], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("parts", [(5, 9), (1, 13), (0, 14), (14, 0)])
def test_merged_statistics_are_those_of_all_rows(cls, parts):
    rows = 100.0 + torch.randn(sum(parts), 6, dtype=torch.float64)  # a mean beside which sums of raw products would lose the rest
    first, second = (cls().add(part) if len(part) else cls() for part in rows.split(parts))
    merged, whole = first.merge(second), cls().add(rows)
    assert merged.count == whole.count
    for name in vars(whole):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
