"""Settings that SAELens had before version 6, as older configs have them: rows of `elsewhere`."""

ROWS = {
    "hook_layer": ("`--layers`", "`hook_name` says it too"),
    "expansion_factor": ("`--expansion-factor`", "a list; 8 by default"),
    "activation_fn": ("`--architecture`", "relu or topk, with `--k`"),
    "b_dec_init_method": (
        "`--set train.b_dec_init=`",
        "mean or geometric_median; not zeros, from which the bias has to find the mean first",
    ),
    "normalize_sae_decoder": (
        "`--set train.decoder_rows=`",
        "unit for true and free for false, with relu; else always of unit length",
    ),
    "scale_sparsity_penalty_by_decoder_norm": (
        "`--set train.decoder_rows=free`",
        "with relu; rows of unit length need no scale",
    ),
    "decoder_heuristic_init": ("", "rows have unit length, and one gain on the encoder fits the data best"),
    "decoder_orthogonal_init": ("", "rows are random directions"),
    "init_encoder_as_decoder_transpose": ("", "always, times the gain that fits best"),
    "mse_loss_normalization": ("`--loss`", "fvu divides by the site's variance, mse by nothing"),
    "noise_scale": ("", "no noise is added"),
    "use_ghost_grads": (
        "`--set train.resample_at=`",
        "with relu, the steps at which dead latents begin again, as in Bricken et al. 2023; with others they "
        "fit the residual: `--auxk-alpha`",
    ),
    "finetuning_tokens": ("", "`--set train.init_from=` trains a finished SAE further, all of it"),
    "finetuning_method": ("", "`--set train.init_from=` trains a finished SAE further, all of it"),
}
"""Equivalent and difference, as `elsewhere.Setting` has them, by name."""
