"""probe"""
import sys, torch, itertools
from torch import nn
from torch.nn import functional as F
from tests.equality import Result, run_one_device, worst_error, _grads, _loss
from tests.gloo_pool import get_pool, stop_pools

class Model(nn.Module):
    def __init__(self, heads, key_heads, dim=4, layers=2, repeat=False):
        super().__init__()
        self.h, self.k, self.d, self.repeat = heads, key_heads, dim, repeat
        w = heads*dim
        self.emb = nn.Embedding(31, w)
        self.pos = nn.Embedding(128, w)
        self.q = nn.ModuleList(nn.Linear(w, w) for _ in range(layers))
        self.kk = nn.ModuleList(nn.Linear(w, key_heads*dim) for _ in range(layers))
        self.v = nn.ModuleList(nn.Linear(w, key_heads*dim) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(w, w) for _ in range(layers))
        self.head = nn.Linear(w, 31, bias=False)
    def forward(self, input_ids, labels):
        b, s = input_ids.shape
        x = self.emb(input_ids) + self.pos(torch.arange(s))
        for q, k, v, o in zip(self.q, self.kk, self.v, self.o):
            y = F.layer_norm(x, (x.shape[-1],))
            qq = q(y).view(b, s, self.h, self.d).transpose(1, 2)
            kk = k(y).view(b, s, self.k, self.d).transpose(1, 2)
            vv = v(y).view(b, s, self.k, self.d).transpose(1, 2)
            if self.repeat:
                kk = kk.repeat_interleave(self.h//self.k, 1); vv = vv.repeat_interleave(self.h//self.k, 1)
            a = F.scaled_dot_product_attention(qq, kk, vv, is_causal=True, enable_gqa=not self.repeat)
            x = x + o(a.transpose(1, 2).reshape(b, s, -1))
        logits = self.head(x)
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

def make(heads, key_heads, batch, seq, repeat):
    torch.manual_seed(0)
    m = Model(heads, key_heads, repeat=repeat).double()
    ids = torch.randint(0, 31, (batch, seq)); labels = ids.clone(); labels[:, : seq//3] = -100
    return m, dict(input_ids=ids, labels=labels)

def work(rank, n, case, strategy):
    import sptransform
    m, i = make(*case)
    sptransform.parallelize(m, strategy, backend="aot_eager")
    loss = m(**i); loss.backward()
    return Result(loss.detach(), _grads(m))

if __name__ == "__main__":
    n = int(sys.argv[1])
    pool = get_pool(n)
    heads = [(8,8),(8,2),(8,1),(6,2),(5,5),(3,1),(7,7),(28,4),(12,3)] if len(sys.argv) < 3 else [eval(sys.argv[2])]
    seqs = [64,61,7,n-1,1] if len(sys.argv) < 4 else [int(sys.argv[3])]
    for (h,k), s, rep in itertools.product(heads, seqs, [False, True]):
        if s < 1: continue
        case = (h,k,2,s,rep)
        m,i = make(*case); ref = run_one_device(m,i)
        try:
            got = pool.run(work, case, "ulysses", timeout=60)
            errs = [worst_error(ref, g) for g in got]
            w = max(errs, key=lambda e:e[1])
            print(n, case, "ok" if w[1] < 1e-12 or (w[1]!=w[1]) else "BAD", w, flush=True)
        except Exception as e:
            t=str(e).strip().splitlines()
            print(n, case, "ERR", t[-3:], flush=True)
    stop_pools()
