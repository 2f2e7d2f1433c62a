"""A larger teacher fused into a smaller student, which then learns from few labels.

    python examples/teacher_student.py

The teacher is twice as deep and three times as wide and was trained on all labels; the student has seen a few. Four
students go on learning from these few: alone or fused with the teacher (its layers joined to the student's depth by
ridge regression, its neurons transported to the student's width), on the labels alone (finetuning) or on the teacher's
outputs for all images as well (distillation, Hinton et al., 1503.02531).
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from common import accuracy, arguments, average, cell, digits, figure, save, size, table, train
from torch import Tensor, nn
from tqdm import tqdm

import fxmerge
from fxmerge.repair import LeastSquares

LABELS = 100  # that the student has
TEMPERATURE = 4.0


class Network(nn.Sequential):
    """Two stages of convolutions with BatchNorm, as many in each as ``depth`` says."""

    def __init__(self, width: int, depth: int):
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for stage in range(2):
            for _ in range(depth):
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.AdaptiveAvgPool2d(1) if stage else nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(width, 10))


def learn(
    student: nn.Module, teacher: nn.Module | None, few: Sequence[Tensor], images: Tensor, held_out: Sequence[Tensor],
    epochs: int, what: str,
) -> list[float]:  # fmt: skip
    """Trains the student in place; its accuracy before the first and after every epoch."""
    optimiser = torch.optim.Adam(student.parameters(), 1e-3)
    found = [accuracy(student, *held_out)]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        said = None if teacher is None else torch.cat([teacher(x) for x in images.split(200)]) / TEMPERATURE
    for _ in tqdm(range(epochs), desc=what, unit="epoch", disable=None, leave=False):
        student.train()
        for index in torch.randperm(len(images), generator=draw).split(64):
            pick = torch.randint(0, len(few[0]), (32,), generator=draw)
            loss = F.cross_entropy(student(few[0][pick]), few[1][pick])
            if said is not None:
                guess = F.log_softmax(student(images[index]) / TEMPERATURE, 1)
                loss = loss + TEMPERATURE**2 * F.kl_div(guess, said[index].softmax(1), reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append(accuracy(student, *held_out))
    return found


def main() -> None:
    args = arguments(__doc__, epochs=12, repeats=3)
    lessons = 2 if args.quick else 10
    images, labels, *held_out = digits()
    curves = defaultdict(list)
    parents = defaultdict(list)
    for repeat in range(args.repeats):
        seed = args.seed + 2 * repeat
        few = images[:LABELS], labels[:LABELS]
        teacher = train(lambda: Network(36, 4), seed, images, labels, args.epochs)
        student = train(lambda: Network(12, 2), seed + 1, *few, epochs=10 * args.epochs)  # one step an epoch
        fused = fxmerge.merge(
            student, teacher, target=student, weights=[0.3, 0.7], example_inputs=images[:2], data=images.split(200),
            repair=LeastSquares(), progress=False,
        ).module  # fmt: skip
        for name, module in {"teacher": teacher, "student": student, "fused": fused}.items():
            parents[name].append((accuracy(module, *held_out), size(module)))
        for start, module in {"student alone": student, "fused": fused}.items():
            for lesson, whose in {"finetuned": None, "distilled": teacher}.items():
                name = f"{start}, {lesson}"
                curves[name].append(learn(deepcopy(module), whose, few, images, held_out, lessons, name))

    rows = [(name, cell([a for a, _ in found]), "") for name, found in parents.items()]
    rows += [(n, cell([c[0] for c in found]), cell([c[-1] for c in found])) for n, found in curves.items()]
    print(table((f"{LABELS} labels", "at first", f"after {lessons} epochs"), rows))
    print("parameters: " + ", ".join(f"{name} {found[0][1]:,}" for name, found in parents.items()))

    fig, (axes,) = figure()
    for name, found in curves.items():
        style = "-" if "distilled" in name else "--"
        colour = "tab:red" if "fused" in name else "tab:blue"
        means = [average(v)[0] for v in zip(*found, strict=True)]
        axes.plot(range(lessons + 1), means, style, color=colour, label=name)
    axes.axhline(average([a for a, _ in parents["teacher"]])[0], color="black", linestyle=":", label="teacher")
    axes.set(title=f"A student with {LABELS} labels, alone and fused with its teacher", xlabel="epochs")
    save(fig, args.out, "teacher_student")


if __name__ == "__main__":
    main()
