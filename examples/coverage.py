"""Check fxmerge on the networks of the zoos in ``zoos/``, and write docs/coverage.md.

    python examples/coverage.py --jobs 2                                   # all of them; goes on where it was stopped
    python examples/coverage.py --zoo timm --only levit_128s --no-twin     # prints, writes no page

Every network runs in a process of its own, with a time limit. Results are kept as one line of JSON per network and
are not made again while the file has them. What fails is a row of the table too.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median

from common import table
from zoos import check
from zoos.check import Row

FOLDER = Path(__file__).parent
ZOOS = sorted(p.stem for p in (FOLDER / "zoos").glob("*.py") if p.stem not in ("__init__", "check"))
PAGE = FOLDER.parent / "docs" / "coverage.md"
HEADER = (
    "network", "front end", "nodes", "free", "neurons", "verify", "twin", "twin s", "analysis s", "ratio", "pinned",
)  # fmt: skip
NOT_RUN = "not run"
LEGEND = """
Results are kept between runs, so rows may come from different commits, and networks may have none yet ("not run").

- front end: symbolic tracing, or a recording of one run; nodes: of the graph; free: neurons that may be permuted.
- verify: relative change of the output in float64 under a random element of the whole inferred symmetry.
- twin: relative difference in float32 between the network and its merge with a permuted twin; twin s: seconds to
  permute, infer again, match, rewrite and verify; empty where that was left out.
- analysis s: seconds to trace and infer; ratio: to one eager forward of the same network on the same inputs.
- pinned: how many neurons, and why; of failures, the stage and the first line of the error.
""".strip()


def work(pipe: Connection, zoo: str, name: str, with_twin: bool) -> None:
    check.check(zoo, name, with_twin, pipe.send)


def sweep(todo: Sequence[tuple[str, str]], with_twin: bool, limit: float, jobs: int) -> Iterator[Row]:
    """A row per network, as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoos.check", *(f"zoos.{zoo}" for zoo in {zoo for zoo, _ in todo})])
    waiting = list(reversed(todo))
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, float, Row]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            zoo, name = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(there, zoo, name, with_twin))
            process.start()
            there.close()
            row = {"zoo": zoo, "name": name, "with_twin": with_twin, "stage": "start", "error": ""}
            running[here] = (process, time.monotonic() + limit, row)
        ready = wait(list(running), max(min(end for _, end, _ in running.values()) - time.monotonic(), 0))
        for pipe, (process, end, row) in list(running.items()):
            if pipe in ready:
                try:
                    running[pipe] = (process, end, pipe.recv())
                    continue
                except EOFError:
                    process.join()
                    if process.exitcode:
                        row["error"] = f"the process ended with exit code {process.exitcode}"
            elif time.monotonic() > end:
                process.kill()
                process.join()
                row["error"] = f"not done after {limit:.0f} s"
            else:
                continue
            pipe.close()
            del running[pipe]
            yield row


def passed(row: Row) -> bool:
    return row["stage"] == "done" and not row["error"]


def ratio(row: Row) -> float:
    return (row["trace_seconds"] + row["infer_seconds"]) / row["forward"]


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""

    def shown(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    analysed = "infer_seconds" in row
    reasons = [f"{count} {why.removeprefix('the network')}" for why, count in list(row.get("pinned", {}).items())[:3]]
    error = re.sub(r"\S*site-packages/", "", row["error"])[:300]
    said = ", ".join(r.replace("'s ", "") for r in reasons) if passed(row) else f"**{row['stage']}**: {error}"
    return (
        row["name"], row.get("front_end", ""), shown("nodes", "d"), shown("free", "d"), shown("total", "d"),
        shown("verify", ".0e"), shown("twin", ".0e"), shown("twin_seconds", ".1f"),
        f"{row['trace_seconds'] + row['infer_seconds']:.1f}" if analysed else "",
        f"{ratio(row):.1f}" if analysed else "", said.replace("|", "\\|"),
    )  # fmt: skip


def summary(zoo: str, rows: Sequence[Row]) -> tuple[str, ...]:
    ratios = [ratio(row) for row in rows if "infer_seconds" in row]
    ran = [row for row in rows if row["stage"] != NOT_RUN]
    good = [row for row in ran if passed(row)]
    free = sum(row["free"] for row in good) / max(sum(row["total"] for row in good), 1)
    middle = f"{median(ratios):.1f}" if ratios else ""
    share = f"{100 * len(good) / max(len(ran), 1):.1f}%"
    return zoo, f"{len(good)} of {len(ran)}", share, f"{len(rows) - len(ran)}", f"{100 * free:.1f}%", middle


def versions() -> str:
    found = []
    for package in ("torch", "torchvision", "timm", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def page(rows: Sequence[Row]) -> str:
    zoos = {zoo: [row for row in rows if row["zoo"] == zoo] for zoo in dict.fromkeys(row["zoo"] for row in rows)}
    summaries = [summary(zoo, members) for zoo, members in zoos.items()]
    parts = [
        "# Coverage: networks of the model zoos",
        f"Written by `python examples/coverage.py` with {versions()}, one thread per network.",
        (check.__doc__ or "").partition("\n\n")[2].strip(),
        table(("zoo", "passed", "", "not run", "free neurons", "median ratio"), summaries, markdown=True),
        LEGEND,
    ]
    for zoo, members in zoos.items():
        parts += [f"## {zoo}", table(HEADER, [cells(row) for row in members], align="llrrrrrrrrl", markdown=True)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", nargs="+", choices=ZOOS, default=ZOOS, help="default: all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks by name")
    parser.add_argument("--no-twin", action="store_true", help="leave out the merge with the permuted twin")
    parser.add_argument("--limit", type=float, default=300, help="seconds per network (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("out/coverage.jsonl"), help="default: %(default)s")
    parser.add_argument("--no-run", action="store_true", help="only write what the results have so far")
    parser.add_argument("--out", type=Path, help=f"default: {PAGE.name} in docs when every network is checked")
    args = parser.parse_args()

    names = [(zoo, name) for zoo in args.zoo for name in importlib.import_module(f"zoos.{zoo}").networks()]
    names = [(zoo, name) for zoo, name in names if args.only is None or name in args.only]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    known = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    rows = {(row["zoo"], row["name"]): row for row in map(json.loads, known) if row["with_twin"] or args.no_twin}
    todo = [] if args.no_run else [key for key in names if key not in rows]
    with args.results.open("a", encoding="utf-8") as file:
        for row in sweep(todo, not args.no_twin, args.limit, args.jobs):
            rows[row["zoo"], row["name"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            told = "  ".join(f"{title} {cell}" for title, cell in zip(HEADER, cells(row), strict=True) if cell)
            print(f"{row['zoo']}  {told}", flush=True)

    missing = {"stage": NOT_RUN, "error": "no result yet", "with_twin": False}
    chosen = [rows.get((zoo, name)) or {"zoo": zoo, "name": name, **missing} for zoo, name in names]
    out = args.out or (None if args.only or args.no_twin or args.zoo != ZOOS else PAGE)
    if out is not None:
        unfinished = out.with_name(out.name + ".part")
        unfinished.write_text(page(chosen), encoding="utf-8")
        os.replace(unfinished, out)
        print(f"wrote {out}")
    if failed := [row["name"] for row in chosen if not passed(row)]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
