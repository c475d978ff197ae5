"""controls/wrap.py: a wrapper passes on, or refuses, whatever the control inside it does; it never drops anything."""

import ast
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from condit.controls.control import ACTS, Control, Fill, Run, Step
from condit.controls.wrap import Sides, Targets, Together, Wrapper, sides, unwrapped
from condit.nn.attention import Call, Site, sdpa
from condit.nn.lora import LoRA
from condit.nn.streams import Stream
from condit_lab.parity.omini_official import WithBlack

SOURCE = Path(__file__).parent.parent.parent / "src" / "condit"
RUN = Run(None, 2, (2, 3), torch.zeros(2, 4), None, 4)  # type: ignore[arg-type]
STEP, SITE = Step(0, 4, 1.0), Site("blocks.0", "self", 0)
STREAM = Stream(torch.ones(2, 1, 4), torch.zeros(1, 3), torch.zeros(2), torch.zeros(2, 4), None, None)
FILL = Fill(torch.zeros(1, 6, 4), torch.tensor([[True, False, True]] * 2))
UPDATE, LEAK = LoRA({"a": (2, 2)}, 1), LoRA({"b": (2, 2)}, 1)
REGION = torch.full((2, 6), 0.5)


class Merged:
    """A reduction that is only compared."""

    mlp = False

    def merge(self, x):
        return x

    unmerge = pick = merge


MERGED = Merged()
# What a control with this act gives.
EDITED = Control()
GIVES: dict[str, Callable] = {
    "around": lambda self, call, attend: attend(call) + 1,
    "streams": lambda self: (STREAM,),
    "fill": lambda self: FILL,
    "lora": lambda self: UPDATE,
    "residual": lambda self, site, query: torch.ones(len(query), query.shape[2], 8),
    "merging": lambda self, site, tokens, image: MERGED,
    "region": lambda self: REGION,
    "edit": lambda self, pair, backbone: EDITED,
}
# Hooks that a wrapper changes on purpose.
CHANGED = {(WithBlack, "negative"): "its other side is that of all conditions together"}


def import_all(root: Path = SOURCE) -> None:
    """Every module that has a class of controls, and the one of docs/write-a-control.md."""
    text = (root.parent.parent / "docs" / "write-a-control.md").read_text(encoding="utf-8")
    page = sys.modules["condit.page"] = ModuleType("condit.page")
    exec(text.partition("```python\n")[2].partition("```")[0], vars(page))
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bases = {ast.unparse(b) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for b in node.bases}
        if bases & {"Control", "Wrapper", "Together", "Targets", "Sides"}:
            importlib.import_module(".".join(("condit", *path.relative_to(root).with_suffix("").parts)))


def kinds_of(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("condit."):
            yield kind
        yield from kinds_of(kind)


import_all()
CONTROLS = sorted(set(kinds_of(Control)), key=lambda kind: kind.__qualname__)
WRAPPERS = [kind for kind in CONTROLS if issubclass(kind, Wrapper)]


def make(name: str, methods: dict[str, Any], base: type = Control) -> Any:
    return type(name, (base,), methods)


def control_that(*methods: str) -> Control:
    """A control with these methods and no others."""
    return make("Probe", {name: GIVES[name] for name in methods})()


def made(kind: type, inner: Control) -> Any:
    """A wrapper of this kind; of fields without a default, tuples are empty, tensors masks, others None."""
    given: dict[str, Any] = {}
    for part in dataclasses.fields(kind):
        is_tuple = str(part.type).startswith("tuple")
        if part.name == "inner":
            given["inner"] = (inner,) if is_tuple else inner
        elif part.default is part.default_factory is dataclasses.MISSING:
            given[part.name] = () if is_tuple else torch.ones(1, 8, 12) if part.type == "Tensor" else None
    return kind(**given)


def dropped_acts(kind: type) -> list[str]:
    """The acts of an inner control that a wrapper of this kind neither passes on nor refuses by a ValueError."""
    query = torch.randn(2, 2, 6, 4)
    plain = Call(query, query + 1, query - 1, SITE, image=slice(0, 6), keys=slice(0, 6))
    dropped = []
    for act, method in ACTS.items():
        try:
            wrapper = made(kind, control_that(method))
            acts = wrapper.acts
            acting = wrapper.prepare(RUN).at(STEP)
            assert acting is not None
        except ValueError:
            continue
        gives = {
            "wrap": lambda c: not torch.equal(c.around(plain, sdpa), sdpa(plain)),
            "join": lambda c: c.streams() == (STREAM,),
            "omit": lambda c: c.fill() is FILL,
            "adapt": lambda c: c.lora() is UPDATE,
            "add": lambda c: c.residual(SITE, query) is not None and bool((c.residual(SITE, query)[1::2] == 1).all()),
            "merge": lambda c: c.merging(SITE, torch.zeros(2, 6, 8), slice(0, 6)) is MERGED,
            "bound": lambda c: c.region() is not None and torch.equal(c.region(), REGION),
            "edit": lambda c: any(inner is EDITED for inner in unwrapped(c.edit(None, None))),
        }[act]
        if act not in acts or act not in acting.acts or not gives(acting):
            dropped.append(act)
    return dropped


@dataclass(frozen=True)
class Notes(Control):
    """Keeps which hooks have made it."""

    made_by: tuple[str, ...] = ()
    off: str = ""  # the hook that leaves it out
    own: dict = field(default_factory=lambda: {"method": "Notes", "mark": "found in the recipe"})

    def by(self, hook: str) -> Any:
        return None if hook == self.off else replace(self, made_by=(*self.made_by, hook))

    def sized(self, size, pipe):
        return self.by(f"sized {size} {pipe}")

    def prepare(self, run):
        assert run is RUN
        return self.by("prepare")

    def at(self, step):
        assert step is STEP
        return self.by("at")

    def negative(self):
        return self.by("negative")

    def recording(self):
        return self.by("recording")

    def leak(self):
        return LEAK

    def text_lora(self):
        return {"layer": (REGION, REGION)}

    def differs(self):
        return False

    def records(self):
        return {"note": REGION}

    def describe(self):
        return self.own


HOOKS = {
    "sized": lambda c: c.sized((8, 8), "pipe"),
    "prepare": lambda c: c.prepare(RUN),
    "at": lambda c: c.at(STEP),
    "negative": lambda c: c.negative(),
    "recording": lambda c: c.recording(),
}


def dropped_hooks(kind: type) -> list[str]:
    """The hooks of an inner control that a wrapper of this kind does not call."""
    dropped = []
    for hook, call in HOOKS.items():
        if (kind, hook) in CHANGED:
            continue
        after = call(made(kind, Notes()))
        made_by = [c.made_by for c in unwrapped(after) if isinstance(c, Notes)] if after is not None else []
        if len(made_by) != 1 or len(made_by[0]) != 1 or not made_by[0][0].startswith(hook):
            dropped.append(hook)
        if hook in ("at", "negative", "recording"):  # these may leave a control out
            off = call(made(kind, Notes(off=hook)))
            if off is not None and any(isinstance(c, Notes) for c in unwrapped(off)):
                dropped.append(f"{hook} that gives None")
    if made(kind, Notes()).leak() is not LEAK:
        dropped.append("leak")
    if set(made(kind, Notes()).text_lora()) != {"layer"}:
        dropped.append("text_lora")
    if made(kind, Notes()).differs():
        dropped.append("differs")
    if made(kind, Notes()).records() != {"note": REGION}:
        dropped.append("records")
    if "found in the recipe" not in str(made(kind, Notes()).describe()):
        dropped.append("describe")
    return dropped


def hidden_methods(kind: type) -> set[str]:
    """Fields of a control that hide a method of `Control`."""
    names = {part.name for part in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return names & {name for name in vars(Control) if not name.startswith("__")}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_passes_on_or_refuses_every_act(kind):
    assert dropped_acts(kind) == []


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_passes_on_every_hook(kind):
    assert dropped_hooks(kind) == []


def test_the_walk_finds_the_wrappers_and_every_method_of_a_control_is_tested():
    assert {"Within", "Wrapper", "Together", "Targets", "Sides", "WithLoRA"} <= {kind.__name__ for kind in WRAPPERS}
    methods = {name for name, value in vars(Control).items() if inspect.isfunction(value) and name[0] != "_"}
    assert methods == {*ACTS.values(), *HOOKS, "leak", "text_lora", "describe", "differs", "records"}


@pytest.mark.parametrize("act", ACTS)
def test_a_planted_drop_of_an_act_is_detected(act):
    plain = getattr(Control, ACTS[act])
    assert dropped_acts(make("Dropping", {ACTS[act]: plain}, Wrapper)) == [act]


@pytest.mark.parametrize("hook", [*HOOKS, "leak", "describe"])
def test_a_planted_drop_of_a_hook_is_detected(hook):
    """`prepare` and the like of Control return the control itself, `negative` None."""
    assert hook in dropped_hooks(make("Dropping", {hook: getattr(Control, hook)}, Wrapper))


@pytest.mark.parametrize("kind", CONTROLS)
def test_no_field_of_a_control_hides_a_method(kind):
    assert hidden_methods(kind) == set()


def test_a_planted_field_that_hides_a_method_is_detected():
    @dataclass(frozen=True)
    class Hides(Control):
        region: int = 0  # type: ignore[assignment]

    assert hidden_methods(Hides) == {"region"}


def test_whatever_contains_a_control_is_a_wrapper():
    """A field that may hold controls of a class that passes nothing on."""
    names = {kind.__name__ for kind in CONTROLS} | {"Control"}
    for kind in set(CONTROLS) - set(WRAPPERS):
        for part in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            words = set(str(part.type).replace("[", " ").replace("]", " ").replace(",", " ").split())
            assert not words & names, f"{kind.__name__}.{part.name} holds a control; derive from Wrapper"


def test_acts_are_the_methods_that_a_class_defines():
    assert Control().acts == frozenset()
    assert control_that("around", "region").acts == {"wrap", "bound"}
    assert Wrapper((control_that("lora"), control_that("around"))).acts == {"adapt", "wrap"}


# Several controls as one


def test_controls_together_wrap_in_the_order_of_the_call_and_the_rest_adds_up():
    double = make("Double", {"around": lambda self, call, attend: 2 * attend(call)})()
    plus = control_that("around", "residual", "streams")
    ones = torch.ones(1, 1, 2, 4)
    call = Call(ones, ones, ones, SITE)
    assert torch.equal(Wrapper((double, plus)).around(call, sdpa), 2 * (sdpa(call) + 1))
    assert torch.equal(Together((double, plus)).around(call, sdpa), 2 * sdpa(call) + 1)
    both: Any = Wrapper((plus, Control(), plus))
    assert both.residual(SITE, call.q).unique().tolist() == [2] and both.streams() == (STREAM, STREAM)
    bounded: Any = Wrapper((control_that("region"),) * 2).region()
    assert bounded.unique().tolist() == [0.25]
    with pytest.raises(ValueError, match="2 controls fill a part of the image"):
        Wrapper((control_that("fill"),) * 2).fill()


def test_a_control_that_is_off_leaves_the_others():
    left: Any = Wrapper((Notes(off="at"), Notes())).at(STEP)
    assert [c.made_by for c in left.inside] == [("at",)]
    assert Wrapper((Notes(off="at"),)).at(STEP) is None


# The sides of guidance


def test_each_side_adds_and_bounds_its_own_rows():
    one: Any = sides([[], [control_that("residual", "region")]])[0]
    addition = one.residual(SITE, torch.zeros(4, 2, 6, 4))
    assert addition.flatten(1).mean(1).tolist() == [0, 0, 1, 1]
    assert one.region().flatten(1).mean(1).tolist() == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize("method", ["lora", "merging", "streams", "fill"])
def test_sides_refuse_what_cannot_differ_between_rows(method):
    with pytest.raises(ValueError, match="need a batch of one side of guidance"):
        sides([[control_that(method)], []])


def test_an_edit_refuses_a_lora_before_its_first_step():
    """A style LoRA has its update from `at` on; before, it was let pass and then dropped."""
    late = make("Late", {"lora": lambda self: None})()
    with pytest.raises(ValueError, match="Late changes source and target alike"):
        Targets(late).prepare(RUN)


def test_a_side_that_is_off_keeps_its_place():
    both: Any = Sides((Notes(off="at"), Notes())).at(STEP)
    assert [len(list(unwrapped(c))) for c in both.inside] == [1, 1]
    assert both.inside[0].acts == frozenset()
