"""How a decoder is served: the fewest devices that meet the latency targets, and which ring for which request.

Every legal (tensor, context, pipeline, formats) is priced in the order of its devices, until one fits in memory
and meets the targets; among layouts of as many devices the one with the least time to the first token is taken.
Fewer devices were all tried, so their number is the least there is under the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from cost_models.attention_choice import crossover
from cost_models.calibration import Calibration
from cost_models.serving import Server, ServingRates
from cost_models.serving_calibration import serving_rates
from cost_models.timeline import TimedOp, schedule
from ir.errors import InfeasibleError, InputError
from ir.llm import DecoderModel
from ir.plan import Assumption, Certificate, RankMemory
from ir.program import Program
from ir.serving import Crossover, ServedLayout, Serving, ServingLayout, ServingRequest
from ir.units import format_bytes, format_seconds

_MORE = 3  # numbers of devices beyond the chosen one whose best layout is listed
_TOTALS = tuple(1000 * 2**k for k in range(3, 11))  # tokens of the decision table: 8K to 1M


@dataclass(frozen=True, slots=True)
class _Priced:
    layout: ServingLayout
    served: ServedLayout
    prefill: dict[str, float]
    decode: dict[str, float]
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class ServeDecoder:
    """Choose how a decoder is served.

    Attributes:
        rates: what the machine reaches; default from ``calibration``, or those of the device kind.
        calibration: constants that ``planner calibrate`` measured.
    """

    name: ClassVar[str] = "serving"
    rates: ServingRates | None = None
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Fill ``decisions.serving``, tables (none), memory, timeline and certificate.

        Raises:
            InputError: no decoder.
            InfeasibleError: no layout fits and meets the targets; it says what the best ones reach.
        """
        model = program.model
        if not isinstance(model, DecoderModel):
            raise InputError(f"{model.name} is no decoder; serving is planned for decoders only")
        request = program.options.constraints.serving or ServingRequest()
        rates = self.rates or serving_rates(program.topology, self.calibration)
        server = Server(model.shape, program.topology, rates)
        limit = _limit(program)
        chosen, others, counts = _search(server, request, limit)
        ranks = chosen.layout.ranks
        section = Serving(
            model=model.shape,
            request=request,
            chosen=chosen.served,
            replicas=program.topology.world_size // ranks,
            prefill=chosen.prefill,
            decode=chosen.decode,
            memory=chosen.memory,
            longest=_longest(server, chosen.layout, chosen.memory, limit, request.batch),
            crossovers=_crossovers(server, chosen.layout),
            alternatives=tuple(replace(o.served, note=_note(chosen, o)) for o in others),
            evaluated=counts[0],
            too_large=counts[1],
            too_slow=counts[2],
        )
        used = section.replicas * ranks
        steps, last = [], ""
        for name, seconds in chosen.prefill.items():
            if seconds > 0:
                steps.append(TimedOp(name, "compute", seconds, (last,) if last else ()))
                last = name
        return replace(
            program,
            tables=(),
            memory=tuple(
                RankMemory(rank, limit, chosen.memory if rank < used else {})
                for rank in range(program.topology.world_size)
            ),
            timeline=schedule(steps),
            certificate=Certificate(
                objective_name="devices of a replica",
                objective=float(ranks),
                lower_bound=float(ranks),
                status="optimal",
                bound_method="every legal layout of fewer devices was priced and does not fit or misses a target",
            ),
            decisions=replace(program.decisions, serving=section),
            assumptions=_assumptions(server),
        )


def _limit(program: Program) -> int:
    constraints = program.options.constraints
    capacity = constraints.memory_limit or program.topology.device.tiers[0].capacity
    return int(capacity * (1 - constraints.memory_reserve))


def _search(
    server: Server, request: ServingRequest, limit: int
) -> tuple[_Priced, list[_Priced], tuple[int, int, int]]:
    """The best layout of the fewest devices, the best of the next few numbers, and counts."""
    found: list[_Priced] = []
    evaluated = too_large = too_slow = 0
    best: _Priced | None = None  # fits, least miss of the targets
    for ranks in range(1, server.topology.world_size + 1):
        here: list[_Priced] = []
        for layout in layouts(server, request, ranks):
            priced = price(server, layout, request)
            evaluated += 1
            if priced.served.memory > limit:
                too_large += 1
                continue
            if best is None or _miss(request, priced) < _miss(request, best):
                best = priced
            if _miss(request, priced) > 0:
                too_slow += 1
                continue
            here.append(priced)
        if here:
            found.append(min(here, key=lambda one: (one.served.ttft, one.served.ttit, one.layout.pipeline)))
        if len(found) > _MORE:
            break
    if not found:
        raise _infeasible(server, request, limit, best)
    return found[0], found[1:], (max(evaluated, 1), too_large, too_slow)


def layouts(server: Server, request: ServingRequest, ranks: int) -> Iterator[ServingLayout]:
    """Legal layouts of so many devices: whole hosts or a divisor of one; heads and width that divide."""
    shape, host = server.shape, server.topology.host_size
    if (ranks % host if ranks > host else host % ranks) != 0:
        return
    for tensor, context in product(_divisors(ranks), repeat=2):
        pipeline, rest = divmod(ranks, tensor * context)
        if rest or pipeline > shape.layers or (tensor % host and host % tensor):
            continue
        if shape.heads % tensor or shape.ffn % tensor:
            continue
        if max(shape.kv_heads, tensor) % min(shape.kv_heads, tensor):
            continue
        wanted = (request.tensor, request.context, request.pipeline)
        if any(w is not None and w != d for w, d in zip(wanted, (tensor, context, pipeline), strict=True)):
            continue
        for weights, cache in product(request.weights, request.cache):
            if weights == "bf16" or "fp8" in server.topology.device.flops:
                yield ServingLayout(tensor, context, pipeline, weights, cache)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def price(server: Server, layout: ServingLayout, request: ServingRequest) -> _Priced:
    """What a layout does for the request."""
    exchange = server.exchange(layout, request.new, request.cached)
    prefill = server.prefill(layout, request.new, request.cached, exchange)
    total = request.new + request.cached
    decode = server.decode(layout, total, request.batch)
    memory = server.memory(layout, request.new, total + request.output, request.batch)
    served = ServedLayout(layout, exchange, sum(prefill.values()), sum(decode.values()), sum(memory.values()))
    return _Priced(layout, served, prefill, decode, memory)


def _miss(request: ServingRequest, priced: _Priced) -> float:
    """How far above the targets, as the larger fraction; 0 when both are met."""
    targets = ((request.ttft, priced.served.ttft), (request.ttit, priced.served.ttit))
    return max(max(0.0, value / target - 1) if target is not None else 0.0 for target, value in targets)


def _infeasible(server: Server, request: ServingRequest, limit: int, best: _Priced | None) -> InfeasibleError:
    world = server.topology.world_size
    if best is None:
        return InfeasibleError(
            f"no layout of up to {world} devices holds the weights and the cache in {format_bytes(limit)} a device",
            conflict=("device memory", "serving.new", "serving.batch"),
            relaxation="more hosts, serving.cache: [fp8], or a smaller batch",
        )
    asked = [
        f"{name} {format_seconds(target)}"
        for name, target in (("ttft", request.ttft), ("ttit", request.ttit))
        if target is not None
    ]
    return InfeasibleError(
        f"no layout of up to {world} devices meets {' and '.join(asked)}; the nearest is {best.layout.label} with "
        f"ttft {format_seconds(best.served.ttft)} and ttit {format_seconds(best.served.ttit)}",
        conflict=tuple(f"serving.{text.split()[0]}" for text in asked),
        relaxation=f"ttft {best.served.ttft:.3g} s and ttit {best.served.ttit:.3g} s",
    )


def _longest(server: Server, layout: ServingLayout, memory: dict[str, int], limit: int, batch: int) -> int:
    """Tokens of each of ``batch`` sequences whose keys and values fit beside weights and buffers."""
    room = limit - memory["weights"] - memory["buffers"]
    return max(0, int(room / (server.cache_bytes_per_token(layout) * batch)) * layout.context)


def _crossovers(server: Server, layout: ServingLayout) -> tuple[Crossover, ...]:
    if layout.context == 1:
        return ()
    shape, rates = server.head_shape(layout), server.ring_rates(layout)[1:]
    return tuple(
        Crossover(
            total,
            crossover(shape, total, layout.context, rates),
            server.exchange(layout, total, 0),
            server.exchange(layout, 1, total - 1),
        )
        for total in _TOTALS
    )


def _note(chosen: _Priced, other: _Priced) -> str:
    terms = {name: other.prefill[name] - seconds for name, seconds in chosen.prefill.items()}
    name = max(terms, key=lambda key: abs(terms[key]))
    sign = "+" if terms[name] > 0 else "-"
    return f"{other.layout.ranks} devices; {name} {sign}{format_seconds(abs(terms[name]))} to the first token"


def _assumptions(server: Server) -> tuple[Assumption, ...]:
    rates = server.rates
    published = rates.source == ServingRates().source
    named = {
        "serving.gemm_efficiency": f"{rates.gemm_efficiency:g} of the peak of the format",
        "serving.launch": f"{format_seconds(rates.launch_seconds)} a layer",
        "serving.ring_step": f"{format_seconds(rates.ring_seconds)} a layer and step",
        "serving.cached_prefix": f"{format_seconds(rates.cached_seconds)} a layer",
        "serving.decode_merge": f"{format_seconds(rates.decode_merge)} a layer",
    }
    read = "arXiv 2411.01783, tables 5 and 8" if published else rates.source
    found = [Assumption(name, value, rates.source) for name, value in named.items()]
    low, high = rates.send_efficiency
    found.append(Assumption("serving.send", f"{low:g} to {high:g} of the link between hosts", read))
    low, high = rates.attention_efficiency
    found.append(Assumption("serving.attention", f"{low:g} to {high:g} of the bf16 peak", read))
    return tuple(found)
