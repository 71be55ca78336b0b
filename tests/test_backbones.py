"Backbones: weights as training scripts wrap them, and heads that train"
import pytest, timm, torch
from fclora.adapt import freeze
from fclora.backbones import create_backbone
from fclora.sites import head_names

def plain(d): return d
def in_model(d): return dict(model=d)
def in_state_dict(d): return dict(state_dict={f'module.{k}':v for k,v in d.items()})

@pytest.mark.parametrize('wrap', [plain, in_model, in_state_dict])
def test_checkpoints_in_the_usual_wrappings(tmp_path, wrap):
    src = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=7)
    torch.save(wrap(src.state_dict()), tmp_path/'w.pth')
    for one_head in (False, True):
        model = create_backbone('deit_tiny_distilled_patch16_224', 3, checkpoint=tmp_path/'w.pth', one_head=one_head)
        assert torch.equal(model.blocks[2].attn.qkv.weight, src.blocks[2].attn.qkv.weight) and torch.equal(model.dist_token, src.dist_token)
        assert head_names(model)==(['head'] if one_head else ['head','head_dist'])

def test_both_heads_of_a_distilled_model_train():
    model = freeze(create_backbone('deit_tiny_distilled_patch16_224', 3, pretrained=False, size=32))
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for n,p in model.named_parameters() if n.startswith('head'))

def test_the_head_is_never_zero():
    for name in ('vit_pico','test_vit'): assert create_backbone(name, 3, pretrained=name=='vit_pico').head.weight.std()>.01
