"""con_probe.py: the bit tests, then times."""
import statistics, sys, time
import pytest, torch
from torch.autograd import DeviceType
sys.path.insert(0, ".")
t0 = time.time()
code = pytest.main(["-q", "--maxfail=8", "--no-header", "-p", "no:warnings", "tests/native/test_cuda_bwd_bits.py"])
print("pytest", code, f"{time.time() - t0:.1f} s", flush=True)
from mtlora_kernels.native import cuda_bwd
from tests.native.test_cuda_bwd_bits import make_case, BF16
from benchmarks.small_batch import captured
from benchmarks.timing import time_call, _flush_buffer
from benchmarks.kernels import short_name
dev = torch.device("cuda")
def kernels(replay, n=8):
    flush = _flush_buffer(dev)
    replay(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as prof:
        for _ in range(n): flush.zero_(); replay()
        torch.cuda.synchronize()
    d = {}
    for e in sorted((e for e in prof.events() if e.device_type == DeviceType.CUDA), key=lambda e: e.time_range.start):
        d.setdefault(short_name(e.name), []).append((e.time_range.start, e.time_range.end))
    ends = sorted(x for v in d.values() for _, x in v)
    # a kernel's own share: from the end of the one before it
    own = {k: statistics.median([e - max([x for x in ends if x < e], default=s) for s, e in v]) for k, v in d.items()}
    return {k: (statistics.median([e - s for s, e in v]), own[k]) for k, v in d.items() if "kernel" in k}
for shape in [(8192,4096,4096,16,16,2), (8192,4096,4096,16,16,32), (16384,768,768,16,25,32), (8192,11008,4096,16,16,2), (512,4096,4096,16,16,2), (32768,4096,4096,16,16,2)]:
    case = make_case(shape, BF16)
    replay = captured(lambda: cuda_bwd.routed_lora_bwd(**case, needs=(True, True, True, True, False, False)))
    only_x = captured(lambda: cuda_bwd.routed_lora_bwd(**case, needs=(True, False, False, False, False, False)))
    for name, r in (("all", replay), ("x only", only_x)):
        print(shape, name, f"{time_call(r, dev, 20).p50:.1f} |", " ".join(f"{n[:-7]} {a:.1f}/{b:.1f}" for n, (a, b) in kernels(r).items()), flush=True)
print(f"{time.time() - t0:.1f} s")
