"""A thousand damaged folders: an error of ours or an equal network; nothing runs, nothing is written, nothing hangs.

Half of the mutations are left to the manifest. The other half come with a manifest to match, as from someone who means
harm: then a network may come out, but only one of the operations on the allow-list.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.errors import FxMergeError
from fxmerge.folder import MANIFEST, seal
from fxmerge.recipe import read_options
from fxmerge.vocabulary import functions, methods, module_class

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="watches a process of its own")
NAMES = """
    os.system subprocess.run builtins.eval builtins.exec builtins.open torch.load torch.hub.load torch.ops.load_library
    __class__ __globals__ __reduce__ __init__ __subclasses__ _modules forward _forward_hooks training 0 a.b a.__class__
    ../../etc/passwd /dev/zero torch.nn.modules.module.Module torch.jit._script.ScriptModule operator.attrgetter
    builtins.getattr torch._assert numpy.load pickle.loads sys.exit get_attr call_function call_method call_module
    placeholder output node tuple dict range slice module function size device dtype
    """.split()
SCALARS: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.5, float("nan"), float("inf"), 1e308),
    *("", " ", "\ud800", "\x00", "x" * 5000, "a\nimport os\nos.system('touch ran')", "\u202e", "cuda:0", "meta"),
    *([], {}, [[]], [None], {"": None}, {"node": "x"}, {"tuple": []}, {"range": [0, 10**12, 1]}, {"size": [2**40] * 4}),
    *({"function": "os.system"}, {"module": {"class": "os.system"}}, {"float": "nan"}, {"device": "nowhere"}),
    {"module": {"class": "torch.nn.modules.container.ParameterList", "args": {"values": {"range": [0, 10**12, 1]}}}},
    {
        "module": {
            "class": "torch.nn.modules.rnn.LSTM",
            "args": {"input_size": 1, "hidden_size": 1, "num_layers": 10**9},
        }
    },
    *NAMES,
]


class Network(nn.Module):
    """Layers, a recurrent one, attention, functions, methods, attributes and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU()
        self.rnn, self.attn = nn.LSTM(4, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, None, False)
        self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = self.rnn(x)[0] * self.scale + self.shift
        x = self.encoder(self.attn(x, x, x)[0])
        return self.last(torch.cat([self.tied(x), x.relu()], -1)[..., : x.shape[-1]].mean(1))


INPUT = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    module = fx.symbolic_trace(Network().eval())
    return fxmerge.save(module, folder, recipe=RECIPE)


RECIPE = {
    "parents": [{"model": "Network", "weights": None, "sha256": "0" * 64}] * 2,
    "matcher": {"name": "PLeaS", "options": {"budget": 1.5, "ratios": None, "cost": "both"}},
    "repair": {"name": "Distill", "options": {"steps": 3, "first": {"name": "Rescale", "options": {"toward": "mean"}}}},
    "depth": {"name": "CLAFusion", "options": {"balance": "grow", "keep": None, "unbiased": False}},
    "weights": {"": [0.5, 0.5], "conv": [1, 0]},
    "target": {"parent": 0},
    "heads": "average",
    "seed": 0,
    "device": "auto",
    "strict": False,
    "verify": True,
    "result": {},
    "versions": {},
}


# Mutations ---------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON document."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(document: Any, draw: random.Random) -> bytes:
    """The document with one to three changes of its structure."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder, key = draw.choice(list(places(document)))
        how = draw.choice("replace replace replace nest deep delete twice rename copy".split())
        if how == "replace":
            holder[key] = draw.choice(SCALARS)
        elif how == "nest":
            holder[key] = draw.choice(([holder[key]], {"tuple": [holder[key]]}, {"dict": [["a", holder[key]]]}))
        elif how == "deep":
            holder[key] = "DEEP"
        elif how == "copy":
            other, place = draw.choice(list(places(document)))
            holder[key] = copy.deepcopy(other[place])
        elif isinstance(holder, list):
            holder.insert(key, holder[key]) if how == "twice" else holder.pop(key)
        else:
            value = holder.pop(key)
            if how != "delete":
                holder[draw.choice(NAMES)] = value
            if how == "twice":
                holder[key] = value
        if not document:
            break
    opening, closing = draw.choice((("[", "]"), ('{"tuple": [', "]}"), ('{"a": ', "}")))
    depth = draw.choice((30, 300, 3000, 100_000))
    text = json.dumps(document, ensure_ascii=False).replace('"DEEP"', opening * depth + "1" + closing * depth)
    return text.encode("utf-8", "surrogatepass")


def bytewise(content: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them flipped, cut off, doubled or replaced."""
    data = bytearray(content)
    how, k = draw.choice(("flip", "flip", "cut", "double", "insert")), draw.randrange(len(data))
    if how == "flip":
        for _ in range(draw.choice((1, 1, 4, 30))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[k : draw.choice((len(data), k + 1, k + 20))]
    elif how == "double":
        data[k:k] = data[k : k + draw.choice((1, 8, 200))]
    else:
        data[k:k] = draw.choice((b"\xff\xfe", b"\x00", b"[" * 5000, b'"', b"1e999", b"NaN", "é".encode("utf-16")))
    return bytes(data)


def header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, or another length of it."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.2:
        return draw.choice((2**63, 2**40, 0, size - 1, size + 8, 10**8)).to_bytes(8, "little") + content[8:]
    text = changed(json.loads(content[8 : 8 + size]), draw)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


# Watching ----------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Took more than its time."""


FORBIDDEN = (
    "os.system os.exec os.posix_spawn os.spawn os.fork os.remove os.rename os.rmdir os.mkdir os.chmod os.truncate "
    "subprocess.Popen shutil. socket. ctypes.dlopen pickle.find_class code.__new__ urllib. webbrowser."
).split()
SECONDS, MEMORY = 10, 2**31


def watched(work: Callable[[Callable[[Callable[[], Any]], Any]], list[str]]) -> list[str]:
    """What ``work`` finds wrong, in a process of its own: it gets a function that calls another under watch."""
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts none
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(writes, json.dumps(work(_watch())[:20]).encode()[:60_000])
        except BaseException:
            os.write(writes, json.dumps([traceback.format_exc()[-3000:]]).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else ["the process died"]


def _watch() -> Callable[[Callable[[], Any]], Any]:
    seen: list[str] = []
    armed = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not armed:
            return
        writes = event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        new = event == "import" and args[0] not in sys.modules
        if writes or new or event.startswith(tuple(FORBIDDEN)):
            seen.append(f"{event} {args}"[:200])

    def late(*_: Any) -> None:
        raise Hang

    def watch(function: Callable[[], Any]) -> Any:
        nonlocal armed
        seen.clear()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        armed = True
        try:
            return function()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if seen:
                raise AssertionError(f"happened: {seen[:3]}")

    sys.addaudithook(hook)
    signal.signal(signal.SIGALRM, late)
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    return watch


def confined(module: fx.GraphModule) -> bool:
    """Whether a network does nothing but what the allow-list names."""
    classes = {type(m) for m in module.modules()} - {type(module)}
    known = all(module_class(f"{c.__module__}.{c.__qualname__}") is c for c in classes)
    nodes = [(n.op, n.target) for n in module.graph.nodes]
    called = all(t in functions().values() for op, t in nodes if op == "call_function")
    return known and called and all(t in methods() for op, t in nodes if op == "call_method")


def explained(error: FxMergeError) -> bool:
    return 10 < len(str(error)) < 10_000


def complaint(seed: int, error: BaseException) -> list[str]:
    """What is wrong with an error: that it is not one of ours, or does not say what it should."""
    if isinstance(error, FxMergeError):
        return [] if explained(error) else [f"{seed}: {str(error)[:300]}"]
    return [f"{seed}: {type(error).__name__} {traceback.format_exc()[-800:]}"]


def fuzzed(
    folder: Path, mutate: Callable[[Path, random.Random], None], accept: Callable[[Any], bool], count: int
) -> list[str]:
    """What goes wrong when the ``count`` mutations of ``folder`` are loaded."""

    def work(watch: Callable[[Callable[[], Any]], Any]) -> list[str]:
        wrong = []
        for seed in range(count):
            target = folder.with_name("mutated")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target)
            mutate(target, random.Random(seed))
            try:
                module = watch(lambda target=target: fxmerge.load(target))
                if not accept(module):
                    wrong.append(f"{seed}: another network")
            except BaseException as error:
                wrong += complaint(seed, error)
        return wrong

    return watched(work)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = saved(tmp_path_factory.mktemp("fuzz") / "out")
    fxmerge.load(made)(INPUT)  # what is imported late is there now
    return made


def test_what_the_manifest_finds(folder) -> None:
    module = fxmerge.load(folder)
    output = module(INPUT)

    def mutate(target: Path, draw: random.Random) -> None:
        file = target / draw.choice(("graph.json", "model.safetensors", "recipe.json", MANIFEST, MANIFEST))
        content = file.read_bytes()
        structure = file.suffix == ".json" and draw.random() < 0.4
        file.write_bytes(changed(json.loads(content), draw) if structure else bytewise(content, draw))

    assert fuzzed(folder, mutate, lambda other: torch.equal(other(INPUT), output), 300) == []


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors"])
def test_what_comes_with_a_manifest_to_match(name, folder) -> None:
    def mutate(target: Path, draw: random.Random) -> None:
        content = (target / name).read_bytes()
        if draw.random() < 0.15:
            content = bytewise(content, draw)
        else:
            content = changed(json.loads(content), draw) if name == "graph.json" else header(content, draw)
        (target / name).write_bytes(content)
        seal(target, ["graph.json", "model.safetensors", "recipe.json"])

    assert fuzzed(folder, mutate, confined, 400 if name == "graph.json" else 150) == []


def test_recipes() -> None:
    parents = [nn.Linear(1, 1), nn.Linear(1, 1)]

    def work(watch: Callable[[Callable[[], Any]], Any]) -> list[str]:
        wrong = []
        for seed in range(150):
            draw = random.Random(seed)
            text = changed(RECIPE, draw) if draw.random() < 0.8 else bytewise(json.dumps(RECIPE).encode(), draw)
            try:
                recipe = json.loads(text)
            except (ValueError, RecursionError):
                continue
            try:
                found = watch(lambda recipe=recipe: read_options(recipe, parents))
                methods = [v for v in found.values() if type(v).__module__.startswith("fxmerge.")]
                simple = [v for v in found.values() if v is None or isinstance(v, (str, bool, int, list, dict))]
                if len(methods) + len(simple) + (found.get("target") in parents) != len(found):
                    wrong.append(f"{seed}: {found}")
            except BaseException as error:
                wrong += complaint(seed, error)
        return wrong

    assert watched(work) == []
