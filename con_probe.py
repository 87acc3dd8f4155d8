"""con_probe.py: bits, then times of contract, route and grad_x in their variants."""
import os, sys, time, statistics
import torch
from torch.autograd import DeviceType
sys.path.insert(0, ".")
from mtlora_kernels.native import cuda_bwd
from mtlora_kernels.reference.routed_lora_bwd import routed_lora_bwd
from mtlora_kernels.testing.compare import difference
from tests.native.test_cuda_bwd_bits import make_case, SHAPES, NAMES, BF16, F16
from benchmarks.small_batch import captured
from benchmarks.timing import time_call, _flush_buffer
from benchmarks.kernels import short_name
t0 = time.time()
dev = torch.device("cuda")
def put(env):
    for k in list(os.environ):
        if k.startswith(("CON_", "GX_")): del os.environ[k]
    os.environ.update(env)
def bits(shapes, E, envs, **opt):
    bad = n = 0
    for shape in shapes:
        case = make_case(shape, E, **opt)
        needs = [case[k] is not None for k in ("x", "lora_a", "lora_b", "router", "pi", "expert_scale")]
        expected = routed_lora_bwd(**case, needs=needs)
        for env in envs:
            put(env)
            try:
                got = cuda_bwd.routed_lora_bwd(**case, needs=needs); torch.cuda.synchronize()
            except Exception as error:
                print("ERROR", shape, env, str(error)[:200]); sys.exit(1)
            for name, a, e in zip(NAMES, got, expected):
                if e is None: continue
                n += 1
                d = difference(a, e)
                if d is not None: bad += 1; print("DIFF", shape, E, env, name, str(d)[:300], flush=True)
    print(f"bits {E} {opt}: {bad} of {n} differ, {time.time() - t0:.1f} s", flush=True)
    return bad
ENVS = [{}, *eval(os.environ.get("PROBE_ENVS", "[]"))]
ok = not bits(SHAPES, BF16, ENVS, scale=True, load=True, relu=True)
bits(SHAPES[:9], F16, ENVS[:1]); bits([SHAPES[0]], BF16, ENVS[:1], router=False)
if len(sys.argv) > 1 and sys.argv[1] == "bits": sys.exit()
def kernels(replay, n=8):
    flush = _flush_buffer(dev)
    replay(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as prof:
        for _ in range(n): flush.zero_(); replay()
        torch.cuda.synchronize()
    d = {}
    for e in sorted((e for e in prof.events() if e.device_type == DeviceType.CUDA), key=lambda e: e.time_range.start):
        d.setdefault(short_name(e.name), []).append(e.time_range.elapsed_us())
    return {k: statistics.median(v) for k, v in d.items() if "kernel" in k}
def times(shape, envs):
    case = make_case(shape, BF16)
    case["activation"] = None
    for env in envs:
        put(env)
        replay = captured(lambda: cuda_bwd.routed_lora_bwd(**case, needs=(True, True, True, True, False, False)))
        only_x = captured(lambda: cuda_bwd.routed_lora_bwd(**case, needs=(True, False, False, False, False, False)))
        k = kernels(replay)
        print(shape, env, f"all {time_call(replay, dev, 20).p50:.1f} x only {time_call(only_x, dev, 20).p50:.1f} |",
              " ".join(f"{n[:-7]} {v:.1f}" for n, v in k.items()), flush=True)
for shape, envs in eval(os.environ["PROBE_TIMES"]): times(shape, envs)
print(f"{time.time() - t0:.1f} s")
