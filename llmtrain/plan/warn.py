"""What is allowed and probably not meant: the warnings of a plan."""

from llmtrain.checks import check_interval, seconds_left
from llmtrain.config import RunConfig
from llmtrain.data.catalogue import MOST_EPOCHS
from llmtrain.hardware import Machine
from llmtrain.nvme import check_nvme
from llmtrain.plan.record import Plan

FRESH_RATE = 3e-4  # of models of billions that start afresh; smaller ones take more


def warn(plan: Plan) -> list[str]:
    """What is allowed and probably not meant."""
    found = warn_of_rows(plan)
    if plan.data.num_rows is None and plan.num_epochs > MOST_EPOCHS:
        found.append(
            f"{plan.num_tokens:,} tokens are {plan.num_epochs:,.0f} passes over the "
            f"{plan.data.num_train_tokens:,} tokens of data={plan.data.name}: past {MOST_EPOCHS} "
            "passes little is learned. Take more data (FineWeb-Edu, say: data=fineweb_edu_10bt; "
            "python -m llmtrain.data recommend has a mixture) or a shorter horizon."
        )
    return found


def warn_of_rate(config: RunConfig) -> list[str]:
    """A model that starts afresh learns little at the rate of fine-tuning."""
    sensible = max(config.model.recipe.lr, FRESH_RATE)
    tunes = config.data.has_masks or config.model.recipe.lr < FRESH_RATE
    if config.model.path is not None or not tunes or config.optimizer.lr >= sensible:
        return []
    return [
        f"optimizer.lr={config.optimizer.lr:g} suits models that are fine-tuned, and "
        f"model={config.model.name} starts afresh: take optimizer.lr={sensible:g}."
    ]


def warn_of_rows(plan: Plan) -> list[str]:
    """Rows that are not trained on as they are."""
    data, found = plan.data, []
    if data.num_skipped:
        found.append(f"{data.num_skipped:,} rows are skipped, the first: {data.first_skipped}")
    if data.num_cut:
        found.append(
            f"{data.num_cut:,} of {data.num_rows:,} rows are longer than train.seq_len="
            f"{plan.seq_len} and lose their end; {data.num_left_out:,} of them have no answer "
            "left and are left out."
        )
    return found


def warn_of_doubt(doubt: str | None) -> list[str]:
    """A model that could not be traced has a memory that is only estimated."""
    if doubt is None:
        return []
    return [f"The model could not be traced, so memory is a rough estimate ({doubt})."]


def check_time(plan: Plan, machine: Machine) -> None:
    """Raise ConfigError where the job around this process ends before anything would be kept."""
    if machine.is_here and plan.step_seconds is not None:
        check_interval(plan.checkpoint_every, plan.num_steps, plan.step_seconds, seconds_left())


def warn_of_disk(plan: Plan, machine: Machine) -> list[str]:
    """A swap folder that is slow. Raises ConfigError for one that cannot be used."""
    swaps = "nvme" in (plan.offload_optimizer, plan.offload_params)
    if not swaps or not machine.is_here:
        return []
    return check_nvme(plan.nvme_path, plan.memory["disk_gib"] * plan.gpus_per_node)
