"""Golden sets of the tuners: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from vlmfast.adapters.tuning import AdemVLConfig, LofitConfig, PillConfig, SlimeConfig
from vlmfast.adapters.tuning.ademvl import NOTE, Shown, entries, projector
from vlmfast.adapters.tuning.lofit import LofitLayer, head_norms, penalty, select_heads, strongest
from vlmfast.adapters.tuning.slime import SlimeLayer
from vlmfast.crossattention import Bank, multiscale, scored, threshold
from vlmfast.modality import KEYWORD, Tokens

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def pill(case: Case, array: Arrays) -> Checks:
    """One block of the authors' model: as it is tuned, in the alignment stage, and as it begins."""
    hyper = case["hyper"]
    mask = torch.zeros(hyper["B"], hyper["T"], dtype=torch.bool)
    for row, (start, end) in enumerate(hyper["image_spans"]):
        mask[row, start:end] = True
    yield "image", mask, array("in_image_mask")
    tuned = PillBlock(hyper, array, depth=2, stage="instruction")
    block, attention = tuned(mask)
    normed = tuned.layer.input_layernorm.base_layer(array("in_h"))
    given = tuned.layer.input_layernorm(array("in_h"))
    yield "norm", normed, array("out_attn_norm")
    yield "adapter", given - normed, array("out_attn_adapter")
    yield "gate", tuned.layer.self_attn.v_proj.gate("default", given), array("out_gate")
    yield "attention", attention, array("out_attention")
    experts = tuned.layer.post_attention_layernorm
    inside = experts.base_layer(array("in_h") + attention)
    yield "visual", experts.pill_visual["default"](inside), array("out_vis_expert")
    yield "text", experts.pill_text["default"](inside), array("out_txt_expert")
    yield "block", block, array("out_block")
    yield "alignment", PillBlock(hyper, array, depth=2, stage="alignment")(mask)[0], array("out_block_pretrain")
    last = PillBlock(hyper, array, depth=1, stage="alignment")(mask)[0]
    yield "alignment, last layer", last, array("out_block_pretrain_lastlayer")
    tuned.layer.self_attn.v_proj.pill_gate["default"].weight.data.zero_()
    yield "gate zero", tuned(mask)[0], array("out_block_gate_zero")


class PillBlock:
    """The first decoder layer of a LLaVA with the authors' weights, tuned by PILL."""

    def __init__(self, hyper: dict[str, Any], array: Arrays, depth: int, stage: str) -> None:
        width, heads = hyper["D"], hyper["H"]
        text = LlamaConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=len(array("in_feed_forward_w1_weight")),
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
        vision = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7, vision_feature_layer=-1)
        settings = PillConfig(r=hyper["r"], gate_init="official", stage=stage)
        self.model = get_peft_model(LlavaForConditionalGeneration(config), settings).eval()
        self.layer = self.model.get_base_model().get_decoder().layers[0]
        self.hidden = array("in_h")
        for name, own in PILL_NAMES.items():
            weight = array(f"in_{name}_weight")
            if name in PILL_ROTATED:  # the authors turn neighbours (2i, 2i + 1), transformers turns i and d/2 + i
                weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            self.layer.get_parameter(f"{own}.weight").data.copy_(weight)

    @torch.no_grad()
    def __call__(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states behind the layer, and what its attention gives. mask: bool [B, L], visual -> [B, L, D] each"""
        seen: list[Tensor] = []
        attention = self.layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        whole = self.layer.register_forward_hook(lambda module, args, output: seen.append(output))
        base = self.model.get_base_model().model
        base(inputs_embeds=self.hidden, mm_token_type_ids=mask.long(), use_cache=False)
        attention.remove()
        whole.remove()
        return seen[1], seen[0]


PILL_ROTATED = ("attention_wq", "attention_wk")
PILL_NAMES = {  # the authors' names of a block's weights, and ours
    "attention_wq": "self_attn.q_proj",
    "attention_wk": "self_attn.k_proj",
    "attention_wv": "self_attn.v_proj.base_layer",
    "attention_wo": "self_attn.o_proj",
    "attention_vis_adapter_gate": "self_attn.v_proj.pill_gate.default",
    "feed_forward_w1": "mlp.gate_proj",
    "feed_forward_w2": "mlp.down_proj",
    "feed_forward_w3": "mlp.up_proj",
    "attention_norm": "input_layernorm.base_layer",
    "ffn_norm": "post_attention_layernorm.base_layer",
} | {
    f"{theirs}_{part}": f"{ours}.default.{own}"
    for theirs, ours in {
        "adapter_attn": "input_layernorm.pill_attn",
        "vis_adapter_ffn": "post_attention_layernorm.pill_visual",
        "txt_adapter_ffn": "post_attention_layernorm.pill_text",
    }.items()
    for part, own in {"down_sampler": "down", "down_sampler_gate": "gate", "up_sampler": "up"}.items()
}


def fill(module: nn.Module, **values: Tensor) -> None:
    """Put arrays into parameters by their names. ValueError for a shape that does not fit."""
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        path = name.replace("__", ".")
        if parameters[path].shape != value.shape:
            raise ValueError(f"{path} is {tuple(parameters[path].shape)}, the golden one {tuple(value.shape)}")
        parameters[path].data = value.clone()


# --- LoFiT ---------------------------------------------------------------------------------------------------------


def lofit(case: Case, array: Arrays) -> Checks:
    """An attention block without, with A, v and both; the ranking of heads; the L1 term."""
    hyper = case["hyper"]
    heads, width, hidden = hyper["heads"], hyper["head_dim"], array("in_hidden")
    config = LlamaConfig(
        hidden_size=hidden.shape[-1],
        num_attention_heads=heads,
        num_key_value_heads=hyper["kv_heads"],
        head_dim=width,
        attn_implementation="eager",
    )
    attention = LlamaAttention(config, 0).eval()
    fill(attention, **{f"{one}_proj__weight": array(f"in_{one}_proj_weight") for one in "qkvo"})
    attention.o_proj = LofitLayer(attention.o_proj, 0, None, heads)
    length = hidden.shape[1]
    position = LlamaRotaryEmbedding(config)(hidden, torch.arange(length)[None])
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    entered: list[Tensor] = []
    attention.o_proj.base_layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    official = {"base": None, "A_only": "A", "v_only": "v", "both": "both"}
    for name, component in official.items():
        if component is not None:
            with_adapter(attention.o_proj, name, LofitConfig(component=component), array("in_A"), array("in_v"))
        with torch.no_grad():
            out, _ = attention(hidden, position_embeddings=position, attention_mask=mask)
        yield name, out, array(f"out_{name}")
        if component in (None, "both"):
            yield f"into o_proj, {name}", entered[-1], array(f"out_oproj_input_{name}")
    factors = array("in_sel_A")
    ranked = nn.Module()
    ranked.layers = nn.ModuleList(
        LofitLayer(nn.Linear(factors[0].numel(), 1), number, None, factors.shape[1]) for number in range(len(factors))
    )
    for layer, factor in zip(ranked.layers, factors):
        with_adapter(layer, "default", LofitConfig(component="A"), factor, factor)
    norms, theirs = head_norms(factors), array("out_sel_heads")
    order = strongest(norms.flatten(), hyper["topk"])
    yield "norms", norms, array("out_sel_norms").double()
    yield "order", torch.stack([order // factors.shape[1], order % factors.shape[1]], dim=1), theirs
    chosen = select_heads(ranked, hyper["topk"])
    pairs = [[int(layer), head] for layer, numbers in chosen.items() for head in numbers]
    yield "heads", torch.tensor(pairs), torch.tensor(sorted(theirs.tolist()))
    yield "L1", penalty(ranked).detach().double(), array("out_l1").double()


def with_adapter(layer: LofitLayer, name: str, config: LofitConfig, factor: Tensor, offset: Tensor) -> None:
    """Make an adapter the active one of a layer, with these values. [H, d] each"""
    layer.update_layer(name, config)
    layer.set_adapter([name])
    if name in layer.lofit_A:
        layer.lofit_A[name].data = factor.clone()
    if name in layer.lofit_v:
        layer.lofit_v[name].data = offset.clone()


# --- SliME's mixture of adapters -----------------------------------------------------------------------------------


def slime_gate(case: Case, array: Arrays) -> Checks:
    """Both experts, the gates and the mixture of a whole view; another length; the table of places."""
    hyper, view, keep = case["hyper"], array("in_x"), array("in_keep")
    width, queries = hyper["Cv"], array("in_rs_query")
    project = nn.Sequential(nn.Linear(width, hyper["D"]), nn.GELU(), nn.Linear(hyper["D"], hyper["D"]))
    for index, name in ((0, "p0"), (2, "p2")):
        fill(project[index], weight=array(f"in_{name}_w"), bias=array(f"in_{name}_b"))
    layer = SlimeLayer(project, None, None)
    layer.update_layer("default", SlimeConfig(num_queries=len(queries), gate_init="official", parity="official"))
    layer.set_adapter(["default"])
    mixture = layer.eval().slime_mixture["default"]
    fill(
        mixture,
        gate=array("in_w_gate"),
        resampler__queries=queries,
        resampler__inward__weight=array("in_rs_inproj_w"),
        resampler__inward__bias=array("in_rs_inproj_b"),
        resampler__outward__weight=array("in_rs_outproj_w"),
        resampler__outward__bias=array("in_rs_outproj_b"),
        resampler__query_norm__weight=array("in_rs_lnq_w"),
        resampler__query_norm__bias=array("in_rs_lnq_b"),
        resampler__view_norm__weight=array("in_rs_lnkv_w"),
        resampler__view_norm__bias=array("in_rs_lnkv_b"),
        resampler__norm__weight=array("in_rs_lnpost_w"),
        resampler__norm__bias=array("in_rs_lnpost_b"),
    )
    with torch.no_grad():
        yield "places", mixture.resampler.places(), array("in_rs_pos")
        yield "projector", project(view)[:, keep], array("out_mlp")
        yield "behind R", project(mixture.resampler(view))[:, keep], array("out_attn")
        yield "gates", mixture.gates(view)[:, keep], array("out_gates")
        yield "mixed", layer(view)[:, keep], array("out_mixed")
        other = array("out_other_len")
        length = 9 * (other.shape[1] - 1) + 1  # every 9th token is stored
        yield "another length", layer(view[:, :length])[:, ::9], other


# --- ADEM-VL -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def adem_vl(case: Case, array: Arrays) -> Checks:
    """The bank of a picture, scores, thresholds and mixtures, and a whole block."""
    hyper, features = case["hyper"], array("in_feats")
    side, gammas = hyper["patch_grid"], hyper["drop"]
    config = ademvl_config(hyper)
    maps = features[:, 1:].unflatten(1, (side, side))
    project = projector(hyper["C"], hyper["proj_hidden"], hyper["D"])
    for index, name in ((0, "fc1"), (2, "fc2")):
        fill(project[index], weight=array(f"in_{name}_w"), bias=array(f"in_{name}_b"))
    pooled = multiscale(maps, config.grids, "official")
    yield "pooled", pooled, array("out_pooled")
    unscaled, values = (
        entries(project, list(maps), one, "official").unflatten(0, (len(maps), -1))
        for one in (ademvl_config(hyper | {"beta": 1.0}), config)
    )
    yield "projected", unscaled, array("out_proj")
    values = values * array("in_indicators")[:, None, None]  # without a picture the entries are zero
    yield "visual", values, array("out_visual")
    bank = Bank.of(list(values), array("in_emb1")[0], array("in_emb2")[0])
    rows = list(range(len(values)))
    x = array("in_x")
    scores = scored(x, bank.keys, 0)[1]
    yield "scores", scores, array("out_scores")
    for gamma in gammas:
        yield f"mixed {gamma}", bank.attend(x, gamma, rows), array(f"out_fusion_drop{gamma}")
        if (least := threshold(scores, gamma)) is not None:
            yield f"threshold {gamma}", least[..., 0], array(f"out_threshold_drop{gamma}")
            stays = scored(x, bank.keys, gamma)[2]
            yield f"stays {gamma}", stays, array(f"out_keep_drop{gamma}")
    block = AdemVLBlock(hyper, array)
    yield "block", block(Shown({"default": bank}, rows)), array("out_block")
    block.model.disable_adapter_layers()
    yield "block without", block(None), array("out_block_noadapter")


def ademvl_config(hyper: dict[str, Any]) -> AdemVLConfig:
    """The settings of the golden case."""
    return AdemVLConfig(
        alpha=hyper["alpha"],
        beta=hyper["beta"],
        gamma=hyper["block_drop"],
        grids=hyper["grids"],
        hidden=hyper["proj_hidden"],
        mode="augment",
    )


class AdemVLBlock:
    """A decoder layer of a LLaVA with the authors' weights and the branch beside its feed-forward net."""

    def __init__(self, hyper: dict[str, Any], array: Arrays) -> None:
        width, heads = hyper["D"], hyper["n_heads"]
        text = LlamaConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=len(array("in_blk_feed_forward_w1_weight")),
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rms_norm_eps=hyper["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": float(hyper["rope_theta"])},
        )
        vision = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7, vision_feature_layer=-1)
        self.model = get_peft_model(LlavaForConditionalGeneration(config), ademvl_config(hyper)).eval()
        self.decoder, self.hidden = self.model.get_base_model().get_decoder(), array("in_blk_h")
        for name, own in ADEMVL_NAMES.items():
            weight = array(f"in_blk_{name}_weight")
            if name in PILL_ROTATED:  # as there: neighbours turn in the authors' code
                weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            fill(self.decoder.layers[0], **{f"{own.replace('.', '__')}__weight": weight})

    def __call__(self, shown: Shown | None) -> Tensor:
        """Hidden states behind the layer. [B, L, D]"""
        notes = {} if shown is None else {NOTE: shown}
        length = self.hidden.shape[1]
        position = self.decoder.rotary_emb(self.hidden, torch.arange(length)[None])
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        out: Tensor = self.decoder.layers[0](
            self.hidden, attention_mask=mask, position_embeddings=position, **{KEYWORD: Tokens(None, notes)}
        )
        return out


ADEMVL_NAMES = {  # the authors' names of a block's weights, and ours
    "attention_wq": "self_attn.q_proj",
    "attention_wk": "self_attn.k_proj",
    "attention_wv": "self_attn.v_proj",
    "attention_wo": "self_attn.o_proj",
    "feed_forward_w1": "mlp.base_layer.gate_proj",
    "feed_forward_w2": "mlp.base_layer.down_proj",
    "feed_forward_w3": "mlp.base_layer.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

SETS: dict[str, Callable[[Case, Arrays], Checks]] = {
    "adem_vl": adem_vl,
    "lofit": lofit,
    "pill": pill,
    "slime_gate": slime_gate,
}
