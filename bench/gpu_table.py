"""What ``bench/gpu.py`` prints: every figure, a line each, and a short table of what counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

REACH_COPY = 0.9
REACH_VERIFY = 0.03
REACH_REGISTER_S = 0.2
REACH_DIGEST = 0.7

Steps = dict[str, Any]


def details(found: dict[str, Any]) -> list[str]:
    """Everything, a line for each part of a step."""
    rows = []
    for name, step in found["steps"].items():
        for key, part in step.items():
            if isinstance(part, dict):
                rows += [f"{name} | {key}: {line}" for line in _lines(part)]
            else:
                rows += [f"{name} | {key}: {part}"]
    return rows


def summary(found: dict[str, Any]) -> list[str]:
    """What counts, as a table."""
    steps = found["steps"]
    rows = [f"machine: {steps.get('machine', {}).get('gpu')}, {steps.get('machine', {}).get('cores')} cores"]
    rows += [f"devices: sources on {found['devices'][0]}, targets on {' '.join(found['devices'][1:] or ['the same'])}"]
    for build in (
        _link,
        _digest,
        _loads,
        _ranks,
        _fanout,
        _quantized,
        _families,
        _kill,
        _slow,
        _registration,
        _failures,
        _reach,
    ):
        try:
            rows += build(steps)
        except Exception as error:  # noqa: BLE001  (what a step that broke off has not said must not cost the other rows)
            rows.append(f"{build.__name__.strip('_')}: incomplete ({type(error).__name__}: {error})")
    return rows


def _link(steps: Steps) -> list[str]:
    part = steps.get("link", {}).get("peer copy", {})
    if not part:
        return []
    sizes = [f"{size} {row['gbps']:.0f} and back {row['back_gbps']:.0f}" for size, row in part.items() if "MiB" in size]
    return [f"link: peer access {part['peer_access']}, copy_ of {', '.join(sizes)} GB/s"]


def _digest(steps: Steps) -> list[str]:
    step = steps.get("digest", {})
    if "copy" not in step:
        return []
    memory = step["copy"]["memory_gbps"]
    rows = [f"device copy: {memory:.0f} GB/s read and written"]
    for shape, part in step.items():
        if isinstance(part, dict) and "kernel_gbps" in part:
            kernel = part["kernel_gbps"]["1024x3"]
            equal = part["equals_host"] and part["equals_twin"] and part["variants_agree"]
            rows.append(
                f"digest {shape}: kernel {kernel:.0f} GB/s = {kernel / memory:.2f} of that; digest_leaves "
                f"{1000 * part['path_s']:.1f} ms (first {1000 * part['path_first_s']:.0f}); equal to the host: {equal}"
            )
    return rows


def _loads(steps: Steps) -> list[str]:
    rows = []
    for name, step in steps.items():
        if not name.startswith("load "):
            continue
        bare = step.get("bare read", {})
        if bare.get("ours_gbps"):
            ours, ipc = _ours(bare), step.get("ipc copy", {}).get("gbps", 0.0)
            rows.append(
                f"{name}: IPC copy_ {ipc:.0f}, one bare NIXL READ {bare['bare_gbps']:.0f} ({bare['ways']}), ours "
                f"without digests {ours:.0f} GB/s"
            )
        rows += [f"{name} {key}: {_load_line(step[key])}" for key in ("nixl 1", "nixl 2", "tcp", "both") if key in step]
        rows += [
            f"{name} {key}: {_publish_line(part)}"
            for key, part in step.items()
            if key in ("nixl publish", "tcp publish")
        ]
        rows += _used(name, step)
    return rows


def _ranks(steps: Steps) -> list[str]:
    rows = []
    for name, step in steps.items():
        if not name.startswith("ranks "):
            continue
        rows.append(f"{name}: {step.get('placement')}")
        ipc, bare = (step.get(key, {}).get("together_gbps", 0.0) for key in ("ipc copy", "bare read"))
        rows.append(f"{name}: all ranks at once, IPC copy_ {ipc:.0f}, bare NIXL READ {bare:.0f} GB/s together")
        rows += [f"{name} {row}" for row in _groups(step)]
        rows += _used(name, step)
    return rows


def _fanout(steps: Steps) -> list[str]:
    step = steps.get("fanout", {})
    rows = [f"fanout: {step['placement']}"] if "placement" in step else []
    rows += [f"fanout {row}" for row in _groups(step)]
    for key, part in step.items():
        if key.endswith("egress"):
            rows.append(
                f"fanout {key}: the source gave {part['shards_from_source']:.2f} shards to {part['targets']} targets"
            )
        elif key.endswith("relays alone"):
            shares = part.get("report", {}).get("shares", [])
            rows.append(f"fanout {key}: {_load_line(part)}; MiB of each {[s['nbytes'] >> 20 for s in shares]}")
    return rows


def _groups(step: dict[str, Any]) -> Iterator[str]:
    for key, part in step.items():
        if key.endswith(" in all"):
            yield (
                f"{key}: {part['nbytes'] / 1e9:.1f} GB in {part['seconds']:.3f} s = {part['gbps']:.1f} GB/s; transfers "
                f"{part['transfer_s']:.3f} s = {part['transfer_gbps']:.1f} GB/s"
            )
        elif " / " in key and "seen" in part:
            yield f"{key}: {_load_line(part)}"


def _used(name: str, step: dict[str, Any]) -> list[str]:
    """Of whole devices: models and contexts of all processes. What a load took above them stands in its line."""
    used = step.get("memory with nixl", {}).get("used_mib")
    return [f"{name}: device memory in use (index, MiB): {used}"] if used else []


def _families(steps: Steps) -> list[str]:
    """How many small models came out right, and which did not."""
    found = {
        name: part for name, part in steps.get("families", {}).items() if isinstance(part, dict) and "right" in part
    }
    if not found:
        return []
    wrong = [f"{name}: {part.get('failed', 'differs')}" for name, part in found.items() if not part["right"]]
    paths = sorted({path for part in found.values() for path in part.get("paths", ())})
    return [f"families: {len(found) - len(wrong)} of {len(found)} right, over {', '.join(paths)}", *wrong]


def _quantized(steps: Steps) -> list[str]:
    step = steps.get("quantized", {})
    return [f"quantized {key}: {_load_line(step[key])}" for key in ("nixl", "tcp") if key in step]


def _kill(steps: Steps) -> list[str]:
    step = steps.get("kill", {})
    rows = [f"{key}: {_load_line(part)}" for key, part in step.items() if isinstance(part, dict) and "killed" in key]
    if "transform" in step:
        part, right = step["transform"], step["transform receive"]["tokens"]["right"]
        rows.append(
            f"copy-on-transform: {part['changed_bytes'] >> 20} MiB changed, {part['held_bytes'] >> 20} held, "
            f"{part['allocated_bytes'] >> 20} allocated; raw bytes received: {right}; source differs: "
            f"{part['source_changed']}"
        )
    return rows


def _slow(steps: Steps) -> list[str]:
    rows = []
    for key, part in steps.get("slow", {}).items():
        if isinstance(part, dict) and "report" in part:
            report = part["report"]
            gave = sorted((share["nbytes"] >> 20 for share in report["shares"]), reverse=True)
            rows.append(f"{key}: {_load_line(part)}; MiB of each {gave}, taken twice {report['duplicated'] >> 20} MiB")
        elif isinstance(part, dict) and "slow" in key:
            rows.append(f"{key}: {_load_line(part)}")
    return rows


def _registration(steps: Steps) -> list[str]:
    return [
        f"registration of {key} in {part['allocations']} allocations: {part['find_allocations_s']:.4f} s to find them, "
        f"{part['register_s']:.4f} s; tensor by tensor {part['per_tensor_s']:.4f} s"
        for key, part in steps.get("registration", {}).items()
        if isinstance(part, dict) and "register_s" in part
    ]


def _failures(steps: Steps) -> list[str]:
    rows = [f"{name}: FAILED {step['failed']}" for name, step in steps.items() if "failed" in step]
    for name, step in steps.items():
        for key, part in step.items():
            if isinstance(part, dict) and ("failed" in part or "error" in part):
                rows.append(f"{name} | {key}: {part.get('failed') or part.get('error')}")
            elif isinstance(part, dict) and "raised" in part and "killed" not in key:
                rows.append(f"{name} | {key}: FAILED {part['raised']}")
            elif isinstance(part, dict) and "seen" in part and not part.get("tokens", {}).get("right", True):
                rows.append(f"{name} | {key}: WRONG TOKENS")
    return rows


# ---- against what was asked for


def _reach(steps: Steps) -> list[str]:
    rows = ["--- asked for, and measured ---"]
    for name, step in steps.items():
        if name.startswith("load ") and step.get("bare read", {}).get("ours_gbps"):
            rows += _copy_reach(name, step)
        elif name.startswith("ranks "):
            rows += _ranks_reach(name, step)
    for name, step in steps.items():
        rows += _verification(name, step) if name.startswith(("load ", "ranks ")) else []
    return [*rows, *_registration_reach(steps), *_digest_reach(steps), _paths(steps)]


def _verification(name: str, step: dict[str, Any]) -> list[str]:
    """Its share of the wall time of each load."""
    shares = {
        key: part["report"]["seconds"]["verify"] / (part["ended"] - part["began"])
        for key, part in step.items()
        if isinstance(part, dict) and "report" in part and "seen" in part
    }
    short = [key for key, share in shares.items() if share > REACH_VERIFY]
    said = ", ".join(f"{key} {100 * share:.1f} %" for key, share in shares.items())
    met = f"SHORT: {', '.join(short)}" if short else "met"
    return [f"verification of {name}: {said} (≤ {100 * REACH_VERIFY:g} %: {met})"] if said else []


def _copy_reach(name: str, step: dict[str, Any]) -> list[str]:
    bare = step["bare read"]
    rows = [_row(f"{name}: our reads / bare NIXL READ", _ours(bare) / bare["bare_gbps"], REACH_COPY)]
    ipc = step.get("ipc copy", {}).get("gbps")
    if ipc:
        rows.append(_row(f"{name}: our reads / IPC copy_", _ours(bare) / ipc, REACH_COPY))
    for key in ("nixl 1", "nixl 2", "nixl 3"):
        if "report" in step.get(key, {}):
            rate = step[key]["report"]["gigabytes_per_second"]
            limit = "IPC copy_" if ipc else "bare NIXL READ"
            rows.append(
                _row(f"{name} {key}: verified transfer / {limit}", rate / (ipc or bare["bare_gbps"]), REACH_COPY)
            )
    return rows


def _ranks_reach(name: str, step: dict[str, Any]) -> list[str]:
    bare = max(step.get(key, {}).get("together_gbps", 0.0) for key in ("ipc copy", "bare read"))
    return [
        _row(f"{name} {key}: verified transfers / the better bare way", part["transfer_gbps"] / bare, REACH_COPY)
        for key, part in step.items()
        if bare and key.startswith("nixl") and key.endswith(" in all")
    ]


def _registration_reach(steps: Steps) -> list[str]:
    rows = []
    for key, part in steps.get("registration", {}).items():
        if isinstance(part, dict) and "register_s" in part:
            rows.append(_row(f"registration of {key}, s", part["register_s"], REACH_REGISTER_S, above=False))
    for name, step in steps.items():
        if name.startswith("load ") and "register_s" in step.get("bare read", {}):
            took = step["bare read"]["register_s"]
            rows.append(_row(f"registration of {name}'s target, s", took, REACH_REGISTER_S, above=False))
    return rows


def _digest_reach(steps: Steps) -> list[str]:
    step = steps.get("digest", {})
    return [
        _row(f"digest {shape} / memory", part["kernel_gbps"]["1024x3"] / step["copy"]["memory_gbps"], REACH_DIGEST)
        for shape, part in step.items()
        if isinstance(part, dict) and "kernel_gbps" in part and "copy" in step
    ]


def _paths(steps: Steps) -> str:
    """Every way that carried bytes of loads that were allowed ``nixl`` alone, as UCX itself names it."""
    used = {
        path
        for step in steps.values()
        for key, part in step.items()
        if isinstance(part, dict) and key.startswith("nixl") and "report" in part and "seen" in part
        for path in part["report"]["paths"]
    }
    fell = [path for path in used if "tcp" in path or "?" in path or not path.startswith("nixl/")]
    verdict = "FELL BACK" if fell else "nothing fell back to TCP" if used else "none was measured"
    return f"transports of all nixl loads: {sorted(used)}: {verdict}"


def _row(what: str, value: float, reach: float, *, above: bool = True) -> str:
    met = value >= reach if above else value <= reach
    return f"{what}: {value:.3f} ({'≥' if above else '≤'} {reach:g}: {'met' if met else 'SHORT'})"


def _ours(bare: dict[str, Any]) -> float:
    return max(value for value in bare["ours_gbps"].values() if isinstance(value, float))


# ---- lines


def _lines(part: dict[str, Any]) -> list[str]:
    if "failed" in part or "error" in part:
        return [f"FAILED {part.get('failed') or part.get('error')}"]
    if "seen" in part:
        profile = [f"{label} {_rounded(row)}" for label, row in part["profile"].items()]
        seconds = _rounded(part.get("report", {}).get("seconds", {}))
        return [f"{_load_line(part)} {seconds} {part.get('report', {}).get('warnings', '')}", *profile]
    if "report" in part:
        profile = [f"{label} {_rounded(row)}" for label, row in part["profile"].items()]
        return [_publish_line(part), *profile]
    return [json.dumps(_rounded({name: value for name, value in part.items() if name not in ("handles", "marks")}))]


def _publish_line(part: dict[str, Any]) -> str:
    seconds = {name: round(value, 3) for name, value in part["report"]["seconds"].items()}
    served = part["report"]["transports"], part["report"]["unavailable"]
    return f"{part['ended'] - part['began']:.3f} s {seconds}, {served}, memory {_rounded(part['memory'])}"


def _load_line(part: dict[str, Any]) -> str:
    if "report" not in part and "raised" not in part:
        return f"FAILED {part.get('failed')}"
    began, seen, total = part["began"], part["seen"], part["ended"] - part["began"]
    if "raised" in part:
        return f"{part['raised']} ({1000 * part.get('seconds_after_kill', -1):.0f} ms after the kill)"
    report = part["report"]
    seconds = report["seconds"]
    said = [
        f"{total:.3f} s, first bytes verified at {seen.get('first', began) - began:.3f}",
        f"transfer {seconds['transfer']:.3f} s = {report['gigabytes_per_second']:.1f} GB/s",
        f"verify {1000 * seconds['verify']:.0f} ms = {100 * seconds['verify'] / total:.1f} %",
        "+".join(report["paths"]),
    ]
    if "tokens" in part:
        said.append(f"tokens {part['tokens']['right']} at {part['tokens']['at'] - began:.3f}")
    if "tokens_right" in part:
        said.append(f"tokens {part['tokens_right']}, {report['retries']} retries")
    if part.get("memory"):
        said.append(f"memory {part['memory']['torch_peak_mib']:.0f} + {part['memory']['device_mib']:.0f} MiB")
        said.append(f"contexts on {part['contexts']}")
    return ", ".join(said)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
