"""The table of rules: what each operation says about neurons.

A rule is a function ``rule(ctx, call)``. ``call["input"]`` is an argument by its name in the operator's schema, with a
``Label`` in place of every tensor that carries neurons; ``ctx`` has the few verbs a rule may use (``align``,
``reduce``, ``contract``, ``move``, ``ordered``, ``positions``). It returns the label of the result, or a list of labels
where the operation returns several tensors.

Operators are named as in ATen without overload and in-place underscore ("add" covers ``+``, ``torch.add``, ``add_``,
``Tensor.add`` and ``operator.iadd``); those of other namespaces keep it ("torchvision::roi_align").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[[Any, Any], Any]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of the named operations.

    For an operation of your own, registered with ``torch.library``::

        @fxmerge.rule("mylib::scale")
        def scale(ctx: Any, call: Any) -> Any:
            return ctx.align(call["x"], call["weight"])   # pointwise: aligned neurons are the same neuron
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register
