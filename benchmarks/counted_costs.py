"""Claim: gradient rows and curvature passes do hardly more than their methods need: operations, copies, waits and bytes, counted.

Nothing is timed. For the shapes of Llama-3-8B and Llama-3.2-1B the row pass over packed documents of uneven lengths, filled up to
full batches as on a GPU, runs on the meta device under torch's counter. The least that the method needs is counted from the
documents alone (`least_rows` and the two beside it). What the two passes of EK-FAC do at these shapes is in `tda/costs.py`, which
the tests hold to torch's counter. Peers are counted under their own interpreters on the same model with every width, the context
and the rank divided by `--narrow`, so that every ratio stays; LogIX needs Python below 3.11 and is left out.

Copies between host and device and their bytes are counted by a stub, waits as operators that the host of a GPU would wait for.
What a compiled decoder layer keeps for its backward pass comes from its graphs, kernels from inductor for the CPU, both of the
narrow model. Prints tables, then one JSON line.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import SHAPES, count_flops, differentiated_from_embeddings
from benchmarks.peers import DRIVERS, PeerError, run_driver
from benchmarks.peers_speed import hand_over
from tda import costs
from tda.data import Documents
from tda.ekfac import corrected_eigenvalues, covariances, eigenbasis
from tda.fit_factors import FLOAT, SHARE_BESIDE_A_PASS, bytes_to_fit, layer_blocks
from tda.losses import ROWS_AT_ONCE
from tda.model import Layer, tracked_layers
from tda.packing import PackedBatch, pack, pack_plan, within_documents
from tda.projection import Projection, random_projections
from tda.row_layers import decoder_layers, row_layers
from tda.streaming import HostBuffers
from tda.task import CausalLM
from tda.text_table import text_table

LARGE = ("Llama-3-8B", "Llama-3.2-1B")
WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")
BODY = r"model\..*"  # the peers' rows are of the body alone
CONTEXT, RANK, BATCH_TOKENS, DOCUMENTS = 512, 64, 16 * 512, 120
CURVATURE_TOKENS = 8 * 512  # of a batch, in whose room factors are fitted
BLOCKS_OF_LOGITS = 3  # at once, in float32, of sampled labels: their logarithms, probabilities and running sums
CARD = 80e9  # bytes of memory of a GPU that curvature is to be fitted on
PEERS = ("ours", "bergson", "dattri_llm", "kronfluence")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")
CPU, META = torch.device("cpu"), torch.device("meta")


# the least


def least_frozen(model: costs.Decoder, load: costs.Load) -> int:
    """Forward, and backward to what the first tracked layers read: 2 operations per weight and token each way.

    Attention has two products of (position, position) by the width forward, and four backward, over a document's own positions,
    those above the diagonal too, as torch counts them. The head counts on the predictions that count.
    """
    return costs.frozen_pass(model, load)


def least_rows(model: costs.Decoder, load: costs.Load, *, rank: int) -> int:
    """`least_frozen`, per token and layer both projections, 2 (d_in k + d_out k), and the outer product, 2 k^2.

    Layers that read one input share its projection.
    """
    k = rank
    projections = sum(layer.d_in * k for layer in model.groups().values()) + sum(layer.d_out * k for layer in model.tracked)
    return least_frozen(model, load) + 2 * load.tokens * (projections + len(model.tracked) * k**2)


def least_covariances(model: costs.Decoder, load: costs.Load) -> int:
    """`least_frozen`, and per token one half of a symmetric product, d (d + 1), for every input that is read and every output."""
    sides = [layer.d_in for layer in model.groups().values()] + [layer.d_out for layer in model.tracked]
    return least_frozen(model, load) + load.tokens * sum(d * (d + 1) for d in sides)


def least_eigenvalues(model: costs.Decoder, load: costs.Load) -> int:
    """`least_frozen`, every document's gradient, 2 d_in d_out per token, and both of its sides rotated.

    A side of width d takes 2 d^2 for every row that is rotated: tokens, for inputs once per group, or the rows of gradients
    from that side, of which a document has as many as its other side is wide, and inputs those of all layers of the group.
    """
    rotated = sum(layer.d_out**2 * min(load.tokens, load.documents * layer.d_in) for layer in model.tracked)
    for group in {layer.group for layer in model.tracked}:
        members = [layer for layer in model.tracked if layer.group == group]
        rows = load.documents * sum(layer.d_out for layer in members)
        rotated += members[0].d_in ** 2 * min(load.tokens, rows)
    gradient = sum(layer.d_in * layer.d_out for layer in model.tracked)
    return int(least_frozen(model, load) + 2 * (rotated + load.tokens * gradient))


# counting


class Waits(TorchDispatchMode):
    """Counts the operators whose result, or its shape, the host has to know: on a GPU it would wait for them."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        if name in WAITING or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Copies:
    """A copy between host and device that is counted."""

    def __init__(self):
        self.sizes: list[int] = []

    def __call__(self, target: Tensor, source: Tensor) -> None:
        """Copy, where there is anything to be copied."""
        self.sizes.append(source.nbytes)
        if not (target.is_meta or source.is_meta):
            target.copy_(source)


@dataclass(frozen=True)
class Case:
    """A model of a shape divided by `narrow`, and documents."""

    model: nn.Module
    documents: Documents
    context: int
    rank: int
    batch_tokens: int

    def decoder(self) -> costs.Decoder:
        """Its shapes; layers of the body are tracked."""
        return costs.tracking(costs.shapes_of(self.model), BODY)

    def load(self, rows: Sequence[int]) -> costs.Load:
        """The documents in `rows` as they are, without padding."""
        return costs.load_of([[row] for row in rows], self.documents.lengths, self.documents.num_loss_tokens)

    def projections(self) -> dict[str, Projection]:
        """Empty where the model is."""
        layers = tracked_layers(self.model, BODY)
        if self.model.device.type != "meta":
            return random_projections(layers, rank=self.rank, seed=0)
        return {
            layer.name: Projection(
                torch.empty(layer.d_in, min(self.rank, layer.d_in), device=META),
                torch.empty(layer.d_out, min(self.rank, layer.d_out), device=META),
            )
            for layer in layers
        }


def made_case(shape: str, *, narrow: int = 1, device: torch.device = META, num_layers: int | None = None) -> Case:
    """The model in bfloat16 on the meta device, else in float32, and documents of half to all of the context."""
    sizes = dict(SHAPES[shape])
    sizes |= {name: sizes[name] // narrow for name in WIDTHS} | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    context = CONTEXT // narrow
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=context, use_cache=False)).eval()
    if device == META:
        model = model.bfloat16()
    random = np.random.default_rng(0)
    lengths = np.clip(np.round(context * random.beta(2.2, 0.9, size=DOCUMENTS)), 4, context).astype(int)
    names = [str(number) for number in range(DOCUMENTS)]
    tokens = [random.integers(0, sizes["vocab_size"], size=length).astype(np.int32) for length in lengths]
    documents = Documents(names, names, names, names, tokens, np.ones(DOCUMENTS, np.int64))
    return Case(model, documents, context, RANK // narrow, BATCH_TOKENS // narrow)


def counted_rows(case: Case) -> dict[str, float]:
    """Operations of the row pass over the full batches, the least, and copies and waits per batch."""
    plan = pack_plan(case.documents.lengths, batch_tokens=case.batch_tokens)[:-1]
    done = [row for rows in plan for row in rows]
    projections, copies = case.projections(), Copies()
    width = sum(held.size for held in projections.values()) + 1
    device = case.model.device
    buffers = HostBuffers(max(map(len, plan)), width, device=CPU, copy=copies)
    waits = Waits()
    layers = tracked_layers(case.model, BODY)

    def work(batches: Sequence[list[int]]) -> None:
        with row_layers(case.model, layers, task=CausalLM(), projections=projections, backend=None) as rows_of:
            for rows in batches:
                vectors, losses = rows_of(pack(case.documents, rows, fill_to=case.batch_tokens).to(device, copy=copies))
                buffers.fetch(torch.cat([vectors.float(), losses.float()[:, None]], dim=1))

    flops = count_flops(lambda: work(plan))
    sizes = list(copies.sizes)
    with waits:
        work(plan[:1])
    num_tokens = int(case.documents.lengths[done].sum())
    least = least_rows(case.decoder(), case.load(done), rank=case.rank)
    return {
        "flops_per_token": flops / num_tokens,
        "least_per_token": least / num_tokens,
        "share_of_least": flops / least,
        "fill": len(plan) * case.batch_tokens / num_tokens,
        "copies_per_batch": len(sizes) / len(plan),
        "bytes_to_device_per_batch": sum(sizes[::2]) / len(plan),
        "bytes_to_host_per_batch": sum(sizes[1::2]) / len(plan),
        "waits_per_batch": len(waits.seen),
    }


def counted_curvature(case: Case) -> dict[str, dict[str, float]]:
    """What the two passes of EK-FAC do by `tda/costs.py` over documents that fill their context, and the least, per token."""
    model = case.decoder()
    load = costs.Load(1, case.context, case.context**2, case.context - 1)
    pairs = {
        "covariances": (costs.covariance_pass(model, load), least_covariances(model, load)),
        "eigenvalues": (costs.eigenvalue_pass(model, load), least_eigenvalues(model, load)),
    }
    return {
        name: {
            "flops_per_token": done / load.tokens,
            "least_per_token": least / load.tokens,
            "share_of_least": done / least,
        }
        for name, (done, least) in pairs.items()
    }


def packed_curvature(case: Case) -> dict[str, float]:
    """Copies and waits of a batch in both passes of EK-FAC over packed documents, beyond those of a pass: what one more adds."""
    layers = tracked_layers(case.model, BODY)
    plan = pack_plan(case.documents.lengths, batch_tokens=case.batch_tokens)
    given: dict[str, Any] = {"task": CausalLM(), "generator": torch.Generator().manual_seed(0)}
    basis: dict[str, tuple[Tensor, Tensor]] = {}

    def counted(batches: Sequence[list[int]]) -> tuple[int, int]:
        copies, waits = Copies(), Waits()

        def held() -> Iterator[PackedBatch]:
            for rows in batches:
                yield pack(case.documents, rows, fill_to=case.batch_tokens).to(case.model.device, copy=copies)

        with within_documents(case.model), waits:
            sums = covariances(case.model, layers, held(), **given)
            basis.update(basis or eigenbasis(sums, layers))
            corrected_eigenvalues(case.model, layers, held(), basis=basis, **given)
        return len(copies.sizes), len(waits.seen)

    counted(plan[:1])  # what a model is asked once
    (copies, waits), (more_copies, more_waits) = counted(plan[:1]), counted(plan[:2])
    return {"copies_per_batch": (more_copies - copies) / 2, "waits_per_batch": (more_waits - waits) / 2}


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention does: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An empty tensor of the output's shape."""
        attended = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, attended)
        return attended


def pass_bytes(case: Case, *, batch_tokens: int = CURVATURE_TOKENS) -> int:
    """What a pass over a batch with sampled labels holds at once: activations for the backward pass, and blocks of logits."""
    rows = pack_plan(case.documents.lengths, batch_tokens=batch_tokens)[0]
    batch = pack(case.documents, rows, fill_to=batch_tokens).to(case.model.device)
    weights = {one.untyped_storage()._cdata for one in case.model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # which stays there, so that no other has its place
        return tensor

    def attend(query: Tensor, key: Tensor, value: Tensor, **_more: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    case.model.requires_grad_(False)
    handle = differentiated_from_embeddings(case.model)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend), within_documents(case.model), hooks:
        case.model.base_model(**batch.inputs, use_cache=False)
    handle.remove()
    logits = BLOCKS_OF_LOGITS * ROWS_AT_ONCE * case.model.config.vocab_size * FLOAT
    return sum(storage.nbytes() for storage in kept.values()) + logits


def fitted_in(case: Case, memory: float) -> dict[str, float]:
    """Fitting EK-FAC of all layers of the body beside the weights in `memory` bytes: blocks of layers, and what they cost."""
    model = case.decoder()
    load = costs.Load(1, case.context, case.context**2, case.context - 1)
    room = SHARE_BESIDE_A_PASS * (memory - sum(one.nbytes for one in case.model.parameters()) - pass_bytes(case))
    blocks = layer_blocks(model.tracked, room=room, copies=1, narrow=True)

    def passes(layers: Sequence[Layer]) -> int:
        part = replace(model, tracked=tuple(layers))
        return costs.covariance_pass(part, load) + costs.eigenvalue_pass(part, load)

    return {
        "blocks": len(blocks),
        "bytes_at_once": max(bytes_to_fit(block, copies=1, narrow=True) for block in blocks),
        "bytes_of_all": bytes_to_fit(model.tracked, copies=1, narrow=True),
        "flops_per_token": sum(map(passes, blocks)) / load.tokens,
        "share_of_one_block": sum(map(passes, blocks)) / passes(model.tracked),
    }


def compiled_layer(case: Case) -> dict[str, float]:
    """What a decoder layer is once it is compiled, that between the first and the last: bytes per token that it keeps, products.

    Bytes are those that its forward graph hands to the backward graph, after the same partition as inductor's.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    kept, products = [], {}

    def compiler(direction: str) -> Callable:
        def compile_graph(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Callable:
            names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            products[direction] = sum(name.startswith(("aten.mm", "aten.addmm", "aten.bmm")) for name in names)

            def run(*inputs: Any) -> Any:
                outputs = graph(*inputs)
                if direction == "forward":
                    known = {one.untyped_storage()._cdata for one in [*inputs, outputs[0]] if isinstance(one, Tensor)}
                    held = {one.untyped_storage()._cdata: one.nbytes for one in outputs if isinstance(one, Tensor)}
                    kept.append(sum(size for storage, size in held.items() if storage not in known) + outputs[0].nbytes)
                return outputs

            return make_boxed_func(run)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=lambda graph, _inputs: make_boxed_func(graph),  # of the losses, which differentiate themselves
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    case.model.bfloat16()
    layers = tracked_layers(case.model, BODY)
    rows = pack_plan(case.documents.lengths, batch_tokens=case.batch_tokens)[0]
    torch._dynamo.reset()
    with row_layers(case.model, layers, task=CausalLM(), projections=case.projections(), backend=backend) as rows_of:
        rows_of(pack(case.documents, rows, fill_to=case.batch_tokens))
    return {"kept_bytes": kept[1] / case.batch_tokens} | {f"products_{name}": number for name, number in products.items()}


def kernels(case: Case) -> dict[str, float]:
    """Kernels that run per decoder layer and batch, eager and compiled by inductor for the CPU, and graph breaks."""
    import torch._inductor
    from torch._dynamo.utils import counters
    from torch.profiler import ProfilerActivity, profile

    layers, projections = tracked_layers(case.model, BODY), case.projections()
    plan = pack_plan(case.documents.lengths, batch_tokens=case.batch_tokens)
    batches = [pack(case.documents, rows, fill_to=case.batch_tokens) for rows in plan[:2]]
    found, rows = {}, {}
    for name, backend in (("eager", None), ("compiled", "inductor")):
        torch._dynamo.reset()
        counters.clear()
        named = torch._inductor.config.patch({"cpp.enable_kernel_profile": True})
        with named, row_layers(case.model, layers, task=CausalLM(), projections=projections, backend=backend) as rows_of:
            for batch in batches:
                rows[name], _ = rows_of(batch)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                rows_of(batches[0])
        found[name] = _launches(profiler.events()) / len(decoder_layers(case.model))
    assert (rows["compiled"] - rows["eager"]).norm() < 1e-4 * rows["eager"].norm(), "compiled layers give other rows"
    return found | {"graph_breaks": sum(counters["graph_break"].values()), "graphs": counters["stats"]["unique_graphs"]}


NO_WORK = (
    r"view|reshape|transpose|expand|slice|select$|strided|squeeze|detach|alias|permute|::t(o)?$|empty|resolve|lift|type|flatten"
)
ONE_KERNEL = r"cpp_fused|::(add|b)?mm$|scaled_dot_product"


def _launches(events: Sequence[Any]) -> int:
    """Operators that do work and have none inside that do: on a GPU each is a kernel, and so are fused kernels."""

    def count(event: Any) -> int:
        if re.search(ONE_KERNEL, event.name):
            return 1
        inside = sum(map(count, event.cpu_children))
        return inside or int(event.name.startswith("aten::") and not re.search(NO_WORK, event.name))

    return sum(count(event) for event in events if event.cpu_parent is None)


def counted_peers(shape: str, *, narrow: int, peers: Sequence[str]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Operations of each peer's passes over rows of full context, in shares of the least; who is left out, and why."""
    case = made_case(shape, narrow=narrow, device=CPU)
    rows = 8
    model = case.decoder()
    load = costs.Load(rows, rows * case.context, rows * case.context**2, rows * (case.context - 1))
    least = {
        "floor": least_frozen(model, load),
        "rows": least_rows(model, load, rank=case.rank),
        "covariances": least_covariances(model, load),
        "eigenvalues": least_eigenvalues(model, load),
    }
    sizes = argparse.Namespace(rows=rows, batch_rows=rows // 2, rank=case.rank, rounds=1)
    found, left_out = {}, {"logix": "needs Python below 3.11"}
    folder = Path(tempfile.mkdtemp(prefix="counted-"))
    try:
        hand_over(folder, case.model, sizes, context=case.context)
        for peer in peers:
            try:
                run_driver(peer, DRIVERS / "count_flops.py", peer, folder)
            except PeerError as error:
                left_out[peer] = str(error)
                continue
            counts = json.loads((folder / "flops.json").read_text(encoding="utf-8"))
            found[peer] = {name: count / least[name] for name, count in counts.items()}
    finally:
        shutil.rmtree(folder)
    return found, left_out


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(LARGE), help="separated by commas")
    parser.add_argument("--narrow", type=int, default=16, help="what widths are divided by for peers and compilation")
    parser.add_argument("--peers", default=",".join(PEERS), help="separated by commas")
    parser.add_argument("--no-compile", action="store_true", help="do not compile, which takes a minute or two")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"claim": "counted_costs", "rank": RANK, "context": CONTEXT, "batch_tokens": BATCH_TOKENS}
    for shape in chosen.shapes.split(","):
        case = made_case(shape)
        passes = {"rows": counted_rows(case)} | counted_curvature(case)
        narrow = made_case(shape, narrow=chosen.narrow, device=CPU, num_layers=3)
        layer = compiled_layer(narrow)
        layer["kept_bytes"] *= chosen.narrow  # every tensor that is kept has one width
        layer["kept_bytes_all_layers"] = layer["kept_bytes"] * BATCH_TOKENS * SHAPES[shape]["num_hidden_layers"]
        layer["weights_bytes"] = sum(one.nbytes for one in case.model.parameters())
        held: dict[str, Any] = {"passes": passes, "layer": layer}
        held["packed_curvature"] = packed_curvature(narrow)
        held["fitted"] = fitted_in(case, CARD)
        held["peers"], held["left_out"] = counted_peers(
            shape, narrow=chosen.narrow, peers=list(filter(None, chosen.peers.split(",")))
        )
        if not chosen.no_compile:
            held["kernels"] = kernels(made_case(shape, narrow=chosen.narrow, device=CPU, num_layers=4))
        result[shape] = held
        print(_tables(shape, held, narrow=chosen.narrow), end="\n\n")
    print(json.dumps(result))


def _tables(shape: str, held: dict[str, Any], *, narrow: int) -> str:
    passes = [
        (name, f"{one['flops_per_token'] / 1e9:.2f}", f"{one['least_per_token'] / 1e9:.2f}", f"{one['share_of_least']:.3f}")
        for name, one in held["passes"].items()
    ]
    peers = [
        (peer, *(f"{counts[name]:.2f}" if name in counts else "-" for name in ("floor", "rows", "covariances", "eigenvalues")))
        for peer, counts in held["peers"].items()
    ]
    rows, layer = held["passes"]["rows"], held["layer"]
    lines = [
        f"{shape}, rank {RANK}, batches of {BATCH_TOKENS} tokens",
        text_table(("pass", "GFLOP/token", "least", "share"), passes),
        "",
        f"operations in shares of the least, widths, context and rank divided by {narrow}",
        text_table(("who", "floor", "rows", "covariances", "eigenvalues"), peers),
        *(f"left out: {peer}: {reason}" for peer, reason in held["left_out"].items()),
        "",
        f"per batch: {rows['copies_per_batch']:.0f} copies ({rows['bytes_to_device_per_batch'] / 1e3:.0f} kB there, "
        f"{rows['bytes_to_host_per_batch'] / 1e6:.1f} MB back), {rows['waits_per_batch']} waits; "
        f"filled up to {rows['fill']:.3f} of the documents' tokens",
        f"a compiled decoder layer: {layer['products_forward']} products forward, {layer['products_backward']} back; it keeps "
        f"{layer['kept_bytes'] / 1e3:.1f} kB a token, all layers {layer['kept_bytes_all_layers'] / 2**30:.1f} GiB of a batch, "
        f"beside {layer['weights_bytes'] / 2**30:.1f} GiB of weights",
    ]
    curvature, fitted = held["packed_curvature"], held["fitted"]
    lines += [
        f"curvature of packed documents, per batch: {curvature['copies_per_batch']:.0f} copy, "
        f"{curvature['waits_per_batch']:.0f} waits",
        f"curvature of all layers in {CARD / 1e9:.0f} GB: {fitted['blocks']} blocks of layers of up to "
        f"{fitted['bytes_at_once'] / 1e9:.0f} GB ({fitted['bytes_of_all'] / 1e9:.0f} GB at once otherwise), "
        f"{fitted['flops_per_token'] / 1e9:.0f} GFLOP a token in both passes, {fitted['share_of_one_block']:.2f} of one block",
    ]
    if "kernels" in held:
        found = held["kernels"]
        lines.append(
            f"kernels per decoder layer, widths divided by {narrow}, on a CPU: {found['eager']:.0f} eager, "
            f"{found['compiled']:.0f} compiled; {found['graphs']} graphs, {found['graph_breaks']} breaks"
        )
    return "\n".join(lines)
