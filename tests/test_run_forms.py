"""``planner run`` carries out towers, codecs, formats, tiers and dedup too, and compares with the unsharded model."""

from __future__ import annotations

from typing import Any

import pytest

from codegen.execution import Form, form_of, losses_of
from codegen.runtime.compare import RunResult, run_plan
from ir.plan import Plan
from planner.render import to_text
from planner.run import render_run
from tests import composed_plans as plans

MODEL = "wukong-small"
ALL = (("f_a", "f_c", "b1"), ("f_d", "f_g"))


def ran(plan: Plan, **how: Any) -> RunResult:
    options = {**plans.options(MODEL), "device": "cpu"}
    towers = plan.decisions.towers
    built = towers is not None and towers.module != "none"
    arguments = (MODEL, plan.to_dict()) if built else (MODEL,)
    factory = "planner.run:build_with_towers" if built else "planner.zoo:build"
    return run_plan(plan, factory, arguments, options, batch=32, steps=1, **how)


def towered(module: str = "none") -> Plan:
    return plans.towered(plans.flat_plan(2, 2, plans.TOWERS_2X2), module)


def composed(codecs: dict[str, tuple[str, float]]) -> Plan:
    plan = plans.tiered(plans.deduplicated(towered(), *ALL))
    return plans.compressed(plans.formatted(plan, plans.FORMATS, plans.STATES), codecs)


@pytest.mark.parametrize(
    ("plan", "form"),
    [
        (towered(), "towers"),
        (towered("wukong"), "towers"),
        (plans.compressed(plans.flat_plan(1, 2, plans.FLAT_2), plans.LOSSLESS), "coded"),
        (composed(plans.LOSSLESS), "composed"),
    ],
    ids=["towers", "modules", "coded", "composed"],
)
def test_exact_plans_equal_the_unsharded_model(plan: Plan, form: Form) -> None:
    assert form_of(plan) == form
    assert losses_of(plan) == ""
    found = ran(plan)
    assert found.form == form
    assert found.equal, found
    assert found.changed == found.tensors
    assert "equal within" in to_text(render_run(plan, found), width=140)


def test_bounded_codecs_are_shown_and_not_judged() -> None:
    plan = composed(plans.BOUNDED)
    found = ran(plan)
    assert "eb_" in losses_of(plan)
    assert not found.equal
    assert found.accepted
    assert 1e-6 < found.outputs.absolute < 0.1
    assert "not exact by the plan's choice (vectors travel in" in to_text(render_run(plan, found), width=140)
