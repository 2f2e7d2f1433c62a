"""The symmetry group of a small network, found without looking at its graph.

The network is a black box ``f(theta, x)``. Every axis of every parameter (and of BatchNorm's running statistics) is a
row of *atoms*; a symmetry permutes the atoms of each axis so that ``f`` stays the same for all ``theta``. The search is
the one that graph isomorphism programs use (individualisation and refinement, McKay 1981), with the network
itself in the place of the graph:

* A colouring of the atoms gives parameters: an entry's value is a random function of the colours of its atoms. Under a
  uniform colouring every parameter is constant, and any permutation of atoms leaves it as it is.
* *Refinement.* If a symmetry carries one colouring into another, then it carries the gradient of ``f`` at the first
  one's parameters into the gradient at the second's. So atoms whose slices of the gradient differ cannot correspond,
  and get different colours, until nothing changes. What is tied (a channel, its BatchNorm entries, the columns
  that read it) shows up by itself as soon as one of the tied atoms has a colour of its own.
* *Search.* To carry atom a to atom b, colour both alike on their two sides, refine, and read the permutation off; where
  cells are left, guess that the rest stays put, else branch. A permutation counts only when ``f`` is equal to 1e-9 at
  random parameters in float64.
* *Order.* Orbits along a chain of pointwise stabilisers; their lengths multiply to the order of the group (the
  orbit-stabiliser theorem, as in Schreier-Sims).

The search is exhaustive: nothing found is false, and what is not found does not exist, with these provisos.

* Only permutations along axes are seen. A swap across two parameters (two equal branches exchanging) or of
  single entries is not, and neither are signs, scales, or rotations.
* A grouped convolution's input atoms are (group, place) pairs, taken from the module's ``groups``; grouped convolution
  called as a function on a parameter is not known as such. Nor are stacks of weights, unless they are given.
* Atoms that the function does not depend on (a key's bias under softmax, a bias before InstanceNorm) stay put.
* Refinement needs gradients that are symmetric where the parameters are, and not zero. For it alone, max over a
  dimension shares its gradient among equals, kinked functions give way to smooth ones with the same symmetries, and
  batch_norm is written out. Sort and topk over neurons have no such form: there the search may miss something.
* The inputs must tell apart what is to be told apart: all word indices must occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from fxmerge.ir import AxisClasses

Axis = tuple[str, int]
Permutation = dict[Axis, list[int]]  # atom i of the axis goes to place [i]
Colouring = dict[Axis, list[int]]


class OracleError(Exception):
    """The search left its budget."""


@dataclass(frozen=True, eq=False)
class Symmetries:
    """The group of a network: its ``order``, ``generators``, and the ``orbits`` of the atoms of each axis."""

    order: int
    generators: tuple[Permutation, ...]
    orbits: Mapping[Axis, list[int]]
    live: Mapping[Axis, list[bool]]


def find_symmetries(
    model: nn.Module,
    inputs: Sequence[Tensor],
    seed: int = 0,
    budget: int = 3000,
    stacks: Mapping[Axis, int] | None = None,
) -> Symmetries:
    """The permutations of parameter axes that leave ``model(*inputs)`` unchanged.

    ``stacks``: axes of which every row along another axis has atoms of its own.

    Raises OracleError when more than ``budget`` refinements were not enough.
    """
    return _Search(model, inputs, seed, budget, stacks or {}).run()


# --------------------------------------------------------------------------------------------------------------
# The inferred classes as a group
# --------------------------------------------------------------------------------------------------------------


def group_order(classes: AxisClasses) -> int:
    """Order of the group that the classes describe: per free class the product of its cells' factorials."""
    order = 1
    for k, c in enumerate(classes):
        if c.free and _acts(classes, k):
            cells: dict[tuple[int, ...], int] = {}
            for block in c.blocks.tolist() if c.parents else [()] * c.size:
                cells[tuple(block)] = cells.get(tuple(block), 0) + 1
            order *= prod(factorial(n) for n in cells.values())
    return order


def _acts(classes: AxisClasses, k: int) -> bool:
    return bool(classes[k].sites) or any(_acts(classes, child) for child in classes.children(k))


def contains(classes: AxisClasses, g: Permutation, live: Mapping[Axis, list[bool]]) -> bool:
    """Whether the group that the classes describe holds ``g``."""
    induced: list[dict[int, int]] = [{} for _ in classes]  # what g does to each class's neurons

    def note(k: int, neuron: int, image: int) -> bool:
        return induced[k].setdefault(neuron, image) == image

    for k, c in enumerate(classes):
        for site, index in c.sites.items():
            axis = (site.parameter, site.axis)
            if axis not in g:
                continue
            where = {place: (i, m) for i, row in enumerate(index.tolist()) for m, place in enumerate(row)}
            for place, (i, m) in where.items():
                if not live[axis][place]:
                    continue
                image, m_image = where.get(g[axis][place], (-1, -1))
                if m_image != m or not note(k, i, image):
                    return False
    for k in reversed(range(len(classes))):  # children come after their parents
        c = classes[k]
        if not c.free and any(i != j for i, j in induced[k].items()):
            return False
        for i, j in induced[k].items():
            blocks = zip(c.parents, c.blocks[i].tolist(), c.blocks[j].tolist(), strict=True)
            if not all(note(*triple) for triple in blocks):
                return False
    return True


def describe(g: Permutation) -> str:
    """A permutation as cycles per axis, moved axes only."""
    rows = []
    for (name, axis), images in g.items():
        cycles, seen = [], set()
        for start in range(len(images)):
            cycle = []
            while start not in seen:
                seen.add(start)
                cycle.append(start)
                start = images[start]
            if len(cycle) > 1:
                cycles.append("(" + " ".join(map(str, cycle)) + ")")
        if cycles:
            rows.append(f"{name}:{axis} {''.join(cycles)}")
    return "; ".join(rows) or "identity"


# --------------------------------------------------------------------------------------------------------------
# The search
# --------------------------------------------------------------------------------------------------------------


def _smooth_prelu(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.view([1, -1] + [1] * (x.dim() - 2)) if weight.numel() > 1 else weight
    return F.softplus(x) - weight * F.softplus(-x)


_SMOOTH = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu), F.softplus),
    **dict.fromkeys((F.relu6, F.hardtanh, F.hardtanh_), torch.tanh),
    **dict.fromkeys((F.hardswish,), F.silu),
    **dict.fromkeys((F.hardsigmoid,), torch.sigmoid),
}


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (x - mean.view(shape)) / (var.view(shape) + options["eps"]).sqrt()
    return y if weight is None or bias is None else y * weight.view(shape) + bias.view(shape)


class _Smooth(TorchFunctionMode):
    """Lets gradients speak: none is zero where a unit is off, and none depends on which of two equals came first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SMOOTH:
            return _SMOOTH[func](args[0])
        if func is F.prelu:
            return _smooth_prelu(*args)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func in (torch.max, Tensor.max) and len(args) == 2 and isinstance(args[1], int):
            return torch.return_types.max((args[0].amax(args[1]), args[0].argmax(args[1])))
        return func(*args, **kwargs)


def _flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs.double().flatten()]
    return [t for o in (outputs.values() if isinstance(outputs, Mapping) else outputs) for t in _flatten(o)]


class _Search:
    def __init__(
        self, model: nn.Module, inputs: Sequence[Tensor], seed: int, budget: int, stacks: Mapping[Axis, int]
    ) -> None:
        self.model, self.budget = model, budget
        self.inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        self.random = np.random.default_rng(seed)
        statistics = {n: b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
        self.tensors = {**dict(model.named_parameters()), **statistics}
        self.constants = {
            n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers() if n not in statistics
        }
        groups = {f"{n}.weight".lstrip("."): m.groups for n, m in model.named_modules() if isinstance(m, _ConvNd)}
        # places[t][a]: for every entry of tensor t (flattened), its atom on axis a
        self.places: dict[str, list[np.ndarray]] = {}
        self.size: dict[Axis, int] = {}
        for name, t in self.tensors.items():
            self.places[name] = [i.ravel() for i in np.indices(t.shape)]
            if (g := groups.get(name, 1)) > 1:
                rows, inside = self.places[name][:2]
                self.places[name][1] = rows // (t.shape[0] // g) * t.shape[1] + inside
            plain = list(self.places[name])
            for a in range(t.dim()):
                if (name, a) in stacks:
                    self.places[name][a] = plain[stacks[name, a]] * t.shape[a] + plain[a]
            for a in range(t.dim()):
                self.size[name, a] = int(self.places[name][a].max()) + 1
        self.entry = {
            name: {atoms: e for e, atoms in enumerate(zip(*(p.tolist() for p in places), strict=True))}
            for name, places in self.places.items()
        }
        self.draws = [self.draw() for _ in range(3)]
        self.telling: set[Axis] = set()  # axes that were good to branch on
        self.live = self.find_live()

    # Parameters from colours, and what the network says about them

    def draw(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per tensor: a value for every tuple of colours, and a weight for every such tuple in the signatures."""
        tables = {}
        for name, t in self.tensors.items():
            sizes = [self.size[name, a] for a in range(t.dim())]
            values = self.random.standard_normal(sizes)
            if name.endswith("running_var"):
                values = abs(values) + 0.5
            elif t.dim() > 1:
                values *= t[0].numel() ** -0.5
            tables[name] = (values, self.random.standard_normal(sizes))
        return tables

    def colours(self, name: str, colouring: Colouring) -> list[np.ndarray]:
        return [np.array(colouring[name, a])[p] for a, p in enumerate(self.places[name])]

    def parameters(self, colouring: Colouring, draw: int) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.asarray(self.draws[draw][name][0][tuple(self.colours(name, colouring))])).view(
                t.shape
            )
            for name, t in self.tensors.items()
        }

    def outputs(self, parameters: dict[str, Tensor]) -> Tensor:
        state = {**parameters, **self.constants}
        return torch.cat(_flatten(torch.func.functional_call(self.model, state, self.inputs)))

    def gradients(self, colouring: Colouring, draw: int) -> tuple[Tensor, dict[str, np.ndarray], float]:
        """The outputs, the gradient of a random combination of them by each tensor, and the largest entry."""
        parameters = {n: p.requires_grad_() for n, p in self.parameters(colouring, draw).items()}
        with _Smooth():
            y = self.outputs(parameters)
        weights = torch.from_numpy(np.random.default_rng(draw).standard_normal(y.shape))
        found = torch.autograd.grad((y * weights).sum(), list(parameters.values()), allow_unused=True)
        flat = {n: g.numpy().ravel() for n, g in zip(parameters, found, strict=True) if g is not None}
        return y.detach(), flat, max(float(abs(g).max()) for g in flat.values())

    def signatures(self, colouring: Colouring, draw: int) -> tuple[Tensor, dict[Axis, np.ndarray], dict[Axis, float]]:
        """The outputs; a number per undecided atom that any symmetry carries along; and the noise in these numbers."""
        y, gradients, scale = self.gradients(colouring, draw)
        found, noise = {}, {}
        for name, flat in gradients.items():
            undecided = [a for a in range(len(self.places[name])) if len(set(colouring[name, a])) < self.size[name, a]]
            colours = self.colours(name, colouring) if undecided else []
            square = flat * flat / max(float(abs(flat).max()), 1e-300)
            for a in undecided:
                # The atom's own colour is left out of the weights: it is compared beside the signature.
                weight = self.draws[draw][name][1][tuple(c * (b != a) for b, c in enumerate(colours))]
                terms = weight * flat + np.cos(weight) * square
                found[name, a] = np.bincount(self.places[name][a], terms, self.size[name, a])
                noise[name, a] = 1e-8 * max(float(abs(found[name, a]).max()), 1e-3 * scale)
        return y, found, noise

    def find_live(self) -> dict[Axis, list[bool]]:
        """Atoms on which the function depends at all."""
        distinct = {axis: list(range(n)) for axis, n in self.size.items()}
        live = {axis: np.zeros(n, dtype=bool) for axis, n in self.size.items()}
        for draw in range(len(self.draws)):
            _, gradients, scale = self.gradients(distinct, draw)
            for name, flat in gradients.items():
                for a, place in enumerate(self.places[name]):
                    live[name, a][place[abs(flat) > 1e-11 * scale]] = True
        return {axis: mask.tolist() for axis, mask in live.items()}

    # Refinement of a pair of colourings

    def refine(self, left: Colouring, right: Colouring) -> tuple[Colouring, Colouring] | None:
        """Split cells by signature on both sides until stable; None when the sides cannot correspond."""
        draw, split = 0, True
        while split:
            self.budget -= 1
            if self.budget < 0:
                raise OracleError("too many refinements")
            y, a, noise = self.signatures(left, draw)
            same = left is right
            z, b, _ = (y, a, noise) if same else self.signatures(right, draw)
            if not torch.allclose(y, z, rtol=1e-8, atol=1e-8 * float(y.abs().max())):
                return None
            new_left, new_right, split = {}, {}, False
            for axis in left:
                new_left[axis], new_right[axis] = left[axis], right[axis]
                if axis in a:
                    pair = _split(left[axis], right[axis], a[axis].tolist(), b[axis].tolist(), noise[axis])
                    if pair is None:
                        return None
                    new_left[axis], new_right[axis] = pair
                    split |= len(set(new_left[axis])) > len(set(left[axis]))
            left, right = new_left, new_left if same else new_right
            draw = (draw + 1) % len(self.draws)
        return left, right

    # Permutations

    def read(self, left: Colouring, right: Colouring) -> Permutation:
        """The permutation that carries cells to cells, moving nothing that may stay."""
        g = {}
        for axis in left:
            cells: dict[int, tuple[list[int], list[int]]] = {}
            for i, (c, d) in enumerate(zip(left[axis], right[axis], strict=True)):
                cells.setdefault(c, ([], []))[0].append(i)
                cells.setdefault(d, ([], []))[1].append(i)
            images = [0] * len(left[axis])
            for here, there in cells.values():
                stay = set(here) & set(there)
                for i in stay:
                    images[i] = i
                gone, come = ([i for i in cell if i not in stay] for cell in (here, there))
                for i, j in zip(gone, come, strict=True):
                    images[i] = j
            g[axis] = images
        return g

    def holds(self, g: Permutation) -> bool:
        """Whether the function is the same after ``g``, at random parameters."""
        moves = {}
        for name, places in self.places.items():
            images = zip(*(np.array(g[name, a])[p].tolist() for a, p in enumerate(places)), strict=True)
            move = [self.entry[name].get(atoms) for atoms in images]
            if None in move:  # rows of one group would need inputs of another
                return False
            moves[name] = torch.tensor(move)
        distinct = {axis: list(range(n)) for axis, n in self.size.items()}
        for draw in range(len(self.draws)):
            before = self.parameters(distinct, draw)
            after = {n: torch.empty_like(t) for n, t in before.items()}
            for n, t in before.items():
                after[n].view(-1)[moves[n]] = t.flatten()
            with torch.no_grad():
                y, z = self.outputs(before), self.outputs(after)
            if (y - z).abs().max() > 1e-9 * y.abs().max():
                return False
        return True

    def search(self, left: Colouring, right: Colouring) -> Permutation | None:
        """A symmetry that carries the left colouring to the right one."""
        if (pair := self.refine(left, right)) is None:
            return None
        left, right = pair
        if self.holds(g := self.read(left, right)):
            return g
        if (cell := self.choose(left)) is None:
            return None
        axis, members, _ = cell
        there = [j for j, c in enumerate(right[axis]) if c == left[axis][members[0]]]
        for j in sorted(there, key=lambda j: j != members[0]):
            if g := self.search(_mark(left, axis, members[0]), _mark(right, axis, j)):
                return g
        return None

    def choose(self, colouring: Colouring) -> tuple[Axis, list[int], Colouring] | None:
        """The cell to branch on: the first with an atom that, set apart, tells atoms of other axes apart.

        Atoms whose effect is hidden as long as others are alike (a query while all keys are equal) come later.
        Returns axis, atoms, and the refined colouring with the first of them set apart.
        """
        first = None
        for axis, members in sorted(_cells(colouring), key=lambda cell: cell[0] not in self.telling):
            marked = _mark(colouring, axis, members[0])
            after, _ = self.refine(marked, marked) or (marked, marked)
            first = first or (axis, members, after)
            if any(len(set(after[other])) > len(set(colouring[other])) for other in after if other != axis):
                self.telling.add(axis)
                return axis, members, after
        return first

    def run(self) -> Symmetries:
        # Dead atoms get a colour each: they stay put.
        start: Colouring = {}
        for axis, mask in self.live.items():
            dead = [i for i, alive in enumerate(mask) if not alive]
            start[axis] = [dead.index(i) + (len(dead) < len(mask)) if i in dead else 0 for i in range(len(mask))]
        levels, (colouring, _) = [], self.refine(start, start) or (start, start)
        while (cell := self.choose(colouring)) is not None:
            axis, members, after = cell
            levels.append((colouring, axis, members))
            colouring = after
        generators: list[Permutation] = []
        orbits = {axis: list(range(n)) for axis, n in self.size.items()}
        order = 1
        for colouring, axis, members in reversed(levels):
            base, failed = members[0], set()
            for j in members[1:]:
                orbit = orbits[axis]
                if orbit[j] == orbit[base] or orbit[j] in {orbit[i] for i in failed}:
                    continue
                if g := self.search(_mark(colouring, axis, base), _mark(colouring, axis, j)):
                    generators.append(g)
                    _join(orbits, g)
                else:
                    failed.add(j)
            order *= sum(orbits[axis][j] == orbits[axis][base] for j in members)
        return Symmetries(order, tuple(generators), orbits, self.live)


def _cells(colouring: Colouring) -> Iterator[tuple[Axis, list[int]]]:
    """Cells of more than one atom, axis by axis."""
    for axis, colours in colouring.items():
        members: dict[int, list[int]] = {}
        for i, c in enumerate(colours):
            members.setdefault(c, []).append(i)
        yield from ((axis, m) for m in members.values() if len(m) > 1)


def _mark(colouring: Colouring, axis: Axis, atom: int) -> Colouring:
    """The colouring with one atom set apart."""
    colours = list(colouring[axis])
    colours[atom] = max(colours) + 1
    return {**colouring, axis: colours}


def _join(orbits: dict[Axis, list[int]], g: Permutation) -> None:
    for axis, images in g.items():
        for i, j in enumerate(images):
            a, b = sorted((orbits[axis][i], orbits[axis][j]))
            if a != b:
                orbits[axis] = [a if o == b else o for o in orbits[axis]]


def _split(
    left: list[int], right: list[int], a: list[float], b: list[float], noise: float
) -> tuple[list[int], list[int]] | None:
    """New colours by (colour, signature), the same on both sides; None when the numbers of atoms differ."""
    atoms = sorted(
        [(c, s, 0, i) for i, (c, s) in enumerate(zip(left, a, strict=True))]
        + [(c, s, 1, i) for i, (c, s) in enumerate(zip(right, b, strict=True))]
    )
    new = ([0] * len(left), [0] * len(right))
    colour, balance, last = 0, 0, atoms[0]
    for atom in atoms:
        if atom[0] != last[0] or atom[1] - last[1] > noise:
            if balance:
                return None
            colour += 1
        new[atom[2]][atom[3]] = colour
        balance += 1 - 2 * atom[2]
        last = atom
    return None if balance else new
