import torch, warnings
from transformers import GPT2Config, GPT2LMHeadModel
from finetune.sites import Sites
from finetune import recipe, schedule
import time
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31,n_positions=8,n_embd=12,n_layer=2,n_head=2,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0,bos_token_id=0,eos_token_id=0))
def test_compiled():
    m=model(); s=Sites(m,0)
    ids=torch.randint(0,31,(2,8))
    a=m(ids,use_cache=False).logits
    t=time.time()
    c=torch.compile(m)
    b=c(input_ids=ids,use_cache=False).logits
    print(time.time()-t)
    b.sum().backward()
    assert (a-b).abs().max()<1e-5
    s.observe(); s.update(.9)
def test_recipes():
    for n in recipe.shipped():
        r=recipe.load(n); schedule.resolve(r.schedule,6,r.steps); r.scaled(50)
def test_net():
    import socket
    s=socket.socket()
    try: s.connect(("8.8.8.8",80))
    except OSError as e: print(e)
def test_bad_shape():
    from finetune import objective
    import jaxtyping, pytest
    with pytest.raises(jaxtyping.TypeCheckError): objective.cross_entropy(torch.zeros(2,3,4), torch.zeros(2,4,dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError): objective.cross_entropy(torch.zeros(2,3,4), torch.zeros(2,3))
