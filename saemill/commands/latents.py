"""Latents one by one: latent, view; by a language model: explain; for other tools' judges: export-latents."""

from saemill.assess.config import LatentConfig
from saemill.commands.flags import OUT, argument, command
from saemill.explain.config import ExplainConfig
from saemill.latents.config import ExportLatentsConfig
from saemill.view.config import ViewConfig


@command(
    LatentConfig,
    "latent",
    *(argument("run"), argument("latents"), OUT),
    *("n_contexts", "n_samples", "context_tokens", "model", "acts", "with_acts", "local_cache", "device"),
)
def latent(config: LatentConfig) -> None:
    """Show any latents of an SAE: where they fire, what they promote, which latents are near.

    They are searched in the cache; the model is not run. Of a run its only SAE is shown, or the one whose
    latents the assessment shows.

    Example: `saemill latent runs/first 123`

    Example: `saemill latent runs/first/layers.8-k32-f6144-s0 0-99 -o latents.html`
    """
    from saemill.assess.latent import run

    run(config)


@command(
    ViewConfig,
    "view",
    argument("run"),
    *(
        "port",
        "n_contexts",
        "n_samples",
        "context_tokens",
        "model",
        "acts",
        "with_acts",
        "local_cache",
        "device",
    ),
)
def view(config: ViewConfig) -> None:
    """Serve the page of an assessed run on this machine, with every latent at hand and the model to try them.

    The page finds any latent, shows which latents fire on a text that is typed, and lets the model write on
    with a latent added. It is served to this machine alone. Of a run the SAE is taken that the assessment
    shows.

    Example: `saemill view runs/first`

    Example: `saemill view runs/first/layers.8-k32-f6144-s0 --port 0`
    """
    from saemill.view.run import run

    run(config)


@command(
    ExplainConfig,
    "explain",
    argument("run"),
    *("url", "model", "latents", "n_latents", "api_key_env"),
    *("temperature", "max_answer_tokens", "at_once", "timeout_seconds"),
    *("acts", "with_acts", "local_cache", "device"),
)
def explain(config: ExplainConfig) -> None:
    """Let a language model explain the latents that an assessment shows, and test what it says.

    The contexts are sent to the endpoint that is named, and nowhere else. Each explanation is written from
    some contexts and judged on others, of other documents, beside contexts where the latent is silent; and so
    is another latent's explanation, as the control. Every prompt and answer is kept; after a stop the same
    command goes on, and nothing is asked twice.

    Example: `saemill explain runs/first --url http://localhost:8000/v1 --model Qwen/Qwen3-8B`
    """
    from saemill.explain.run import run

    run(config)


@command(
    ExportLatentsConfig,
    "export-latents",
    argument("run"),
    *("format", OUT, "latents", "max_tokens", "ctx", "held_out", "n_splits", "release"),
    *("model", "acts", "local_cache", "device"),
)
def export_latents(config: ExportLatentsConfig) -> None:
    """Write what SAEs' latents do on the cached tokens for other tools' judges; the model is not run.

    delphi explains and scores latents from its cache; batches of saedashboard convert to Neuronpedia;
    saebench has the results of SAEBench's core and of SAELens' evals, from the figures of `saemill assess`.

    Example: `saemill export-latents runs/first --format delphi -o for-delphi`

    Example: `saemill export-latents runs/first/layers.8-k32-f6144-s0 --format saedashboard -o batches`
    """
    from saemill.latents.run import run

    run(config)
