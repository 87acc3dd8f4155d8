"""prof.py CASE...: one profiled fwd+bwd of the CUDA kernels per case. T,d,N,G,numerics"""
import sys, torch
import mtlora_kernels as mk
from mtlora_kernels import dispatch
dispatch.BUILT["triton"] = False
rt = torch.cuda.cudart()
def make(T, d, N, G, r=16):
    g = torch.Generator("cuda").manual_seed(0)
    f = lambda *s: torch.randn(*s, device="cuda", generator=g)
    x = f(T, d).bfloat16().requires_grad_(); res = f(T, d).bfloat16().requires_grad_()
    a = (f(r, d) / d**.5).bfloat16().requires_grad_(); b = (f(N, d, r) / r**.5).bfloat16().requires_grad_()
    R = (f(G * N, d) / d**.5).bfloat16().requires_grad_()
    return x, a, b, R, res, f(T, d).bfloat16()
for case in sys.argv[1:]:
    T, d, N, G, kind, what = case.split(",")
    x, a, b, R, res, dout = make(int(T), int(d), int(N), int(G))
    def go():
        if what == "f":
            with torch.no_grad():
                return mk.routed_lora(x, a, b, R, res, scaling=1.5, num_groups=int(G), numerics=kind, impl="cuda")
        out = mk.routed_lora(x, a, b, R, res, scaling=1.5, num_groups=int(G), numerics=kind, impl="cuda")
        out.backward(dout)
    go(); torch.cuda.synchronize()
    rt.cudaProfilerStart(); go(); torch.cuda.synchronize(); rt.cudaProfilerStop()
