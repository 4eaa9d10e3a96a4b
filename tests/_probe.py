from collections import Counter
import torch, sptransform
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from tests.models import build
from tests.equality import run_one_device
GR={}
def keep(which):
    def c(gm, inputs):
        GR[which]=gm
        return gm
    return c
be = aot_autograd(fw_compiler=keep("fw"), bw_compiler=keep("bw"), partition_fn=min_cut_rematerialization_partition)
def make(name, ck):
    model, inputs = build(name)
    if name=="llama" and ck:
        model.gradient_checkpointing_enable() if ck=="default" else model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant":False})
    elif ck:
        from torch.utils.checkpoint import checkpoint
        for b in model.blocks:
            f=b.forward
            b.forward = (lambda f: lambda x: checkpoint(f, x, use_reentrant=False))(f)
    return model, inputs
VIEWS={"view","_unsafe_view","permute","transpose","t","clone","cat","split_with_sizes","wait_tensor","expand","select","getitem","detach","slice","unsqueeze","reshape","alias","squeeze"}
def describe():
    fw,bw=GR["fw"],GR["bw"]
    out=list(fw.graph.output_node().args[0])
    st=lambda n: n.meta['val'].untyped_storage()._cdata if isinstance(n.meta.get('val'),torch.Tensor) else None
    ins={st(n) for n in fw.graph.nodes if n.op=="placeholder"}
    saved={}
    for n in out:
        if hasattr(n,'op') and n.op!="placeholder" and st(n) not in ins: saved.setdefault(st(n),(n.name,str(n.target),str(n.meta.get("recompute")),str(list(n.meta["val"].shape))))
    nm=lambda n: n.target.__name__.split(".")[0] if not isinstance(n.target,str) else n.target
    cnt=lambda g: Counter(nm(n) for n in g.graph.nodes if n.op=="call_function" and nm(n) not in VIEWS)
    return list(saved.values()), cnt(fw), cnt(bw)
def work(rank, ws, name, ck, sharded):
    model, inputs = make(name, ck)
    if sharded:
        if "keep_graphs" not in torch._dynamo.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(be, name="keep_graphs")
        model = sptransform.parallelize(model,"ulysses",backend="keep_graphs")
    else:
        model.compile(backend=be, fullgraph=True)
        from sptransform.parallelize import configured
        model._compiled_call_impl=configured(model._compiled_call_impl)
    model(**inputs) if 0 else None
    r=run_one_device(model, inputs)
    return describe()

def selective(rank, ws, sharded, amp=False):
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    from functools import partial
    aten=torch.ops.aten
    ctx=partial(create_selective_checkpoint_contexts,[aten.addmm.default, aten.mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default])
    model, inputs = build("sdpa_transformer", dtype=torch.float32 if amp else torch.float64)
    for b in model.blocks:
        f=b.forward
        b.forward = (lambda f: lambda x: checkpoint(f, x, use_reentrant=False, context_fn=ctx))(f)
    if sharded:
        if "keep_graphs" not in torch._dynamo.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(be, name="keep_graphs")
        model = sptransform.parallelize(model,"ulysses",backend="keep_graphs")
    else:
        model.compile(backend=be, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        r=run_one_device(model, inputs)
    return describe(), r
