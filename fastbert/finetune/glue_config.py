"""What GLUE is (Wang et al. 2019): its tasks, their official metrics; and what a run can be told.

WNLI and the diagnostic set AX are left out: the first cannot be learnt from its training examples,
the second has none.
"""

from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, ClassVar

from fastbert.errors import UserError, did_you_mean
from fastbert.finetune.config import RUN, TRAIN, ClassifyConfig
from fastbert.settings import Config, check_fields, check_not_empty, setting, settings


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: as GLUE's table has it.
        folders: its folder's names, without dashes and in lower case.
        tsv: columns of the files of GLUE: text, second text or "", label.
        hub: those of the data set on Hugging Face's hub.
        metrics: name in an evaluation -> name in the table; their mean is the task's score.
        labels: by number, as the TSV files name them; none: a number from 0 to 5.
        names: of the labels on the hub, by number.
        left_out: a label that says that there is none.
    """

    name: str
    folders: tuple[str, ...]
    tsv: tuple[str, str, str]
    hub: tuple[str, str, str]
    metrics: dict[str, str]
    labels: tuple[str, ...]
    names: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """That are evaluated: what stands behind "dev" and "validation" in a file's name."""
        return ("_matched", "_mismatched") if self.name == "MNLI" else ("",)


_BINARY = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
_INFERRED = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2", "label")
MNLI_MM = "accuracy_mm"
"""The accuracy on the mismatched examples."""

TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA", ("cola",), ("4", "", "2"), ("sentence", "", "label"), {"matthews": "Matthews"},
            _BINARY, ("unacceptable", "acceptable"),
        ),
        GlueTask(
            "SST-2", ("sst2", "sst"), ("sentence", "", "label"), ("sentence", "", "label"),
            {"accuracy": "accuracy"}, _BINARY, ("negative", "positive"),
        ),
        GlueTask(
            "MRPC", ("mrpc",), ("#1 String", "#2 String", "Quality"), _PAIR,
            {"f1": "F1", "accuracy": "accuracy"}, _BINARY, ("not_equivalent", "equivalent"),
        ),
        GlueTask(
            "STS-B", ("stsb",), ("sentence1", "sentence2", "score"), _PAIR,
            {"pearson": "Pearson", "spearman": "Spearman"}, (),
        ),
        GlueTask(
            "QQP", ("qqp",), ("question1", "question2", "is_duplicate"),
            ("question1", "question2", "label"), {"f1": "F1", "accuracy": "accuracy"}, _BINARY,
            ("not_duplicate", "duplicate"),
        ),
        GlueTask(
            "MNLI", ("mnli", "multinli"), ("sentence1", "sentence2", "gold_label"),
            ("premise", "hypothesis", "label"), {"accuracy": "m", MNLI_MM: "mm"}, _INFERRED,
            _INFERRED, "-",
        ),
        GlueTask(
            "QNLI", ("qnli",), ("question", "sentence", "label"), ("question", "sentence", "label"),
            {"accuracy": "accuracy"}, _ENTAILED, _ENTAILED,
        ),
        GlueTask("RTE", ("rte",), _PAIR, _PAIR, {"accuracy": "accuracy"}, _ENTAILED, _ENTAILED),
    )
}  # fmt: skip

GRIDS = {
    # Devlin et al. 2019, section 4.1: what BERT's numbers on GLUE were found with.
    "published": ((5e-5, 4e-5, 3e-5, 2e-5), (32,), (3.0,)),
    # The same, appendix A.3: what they found to work well across all tasks.
    "wide": ((5e-5, 3e-5, 2e-5), (16, 32), (2.0, 3.0, 4.0)),
}
"""Learning rates, batch sizes and epochs."""

_SETTINGS = {one.name: one for one in fields(ClassifyConfig)}


def _as_classify(name: str, **changes: Any) -> Any:
    """A setting of `fastbert finetune classify`; `changes` are of its default and metadata."""
    known = _SETTINGS[name]
    metadata = dict(known.metadata)
    return setting(**{"default": known.default, **metadata, **changes})


@dataclass(frozen=True)
class GlueConfig(Config):
    """Which tasks are run, on what, and with which settings of `ClassifyConfig`.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    command: ClassVar[str] = "glue"

    model: str = _as_classify("model")
    data: str = setting(
        "",
        "folder of GLUE's folders (CoLA, SST-2 ...): TSV, or datasets saved to disk or as Parquet",
        RUN,
        aka=("data_dir", "glue_dir", "dataset"),
    )
    tasks: str = setting("all", "those to run, with commas between", RUN, aka=("task_name", "task"))
    out: str = _as_classify("out", help="folder of the runs (auto = the next free runs/glue-001)")
    device: str = _as_classify("device", help="device (auto = every GPU, if there is one)")
    parallel: int = setting(
        0, "tasks at the same time (0 = one a GPU; one on a CPU)", RUN, at_least=0, at_most=64,
        aka=("jobs", "num_workers"),
    )  # fmt: skip
    seed: int = _as_classify("seed", help="the head's weights, data order and dropout")
    seeds: int = _as_classify("seeds")
    resume: bool = _as_classify("resume", help="go on where out's last command was killed")
    precision: str = _as_classify("precision")
    num_threads: int = _as_classify("num_threads")
    keep_models: bool = setting(False, "keep each run's model, not its numbers alone", RUN)

    max_seq_length: int | None = _as_classify(
        "max_seq_length", help="longest sequence, tokens (none = 128, at most the model's)"
    )

    hidden_dropout_prob: float | None = _as_classify("hidden_dropout_prob")
    attention_probs_dropout_prob: float | None = _as_classify("attention_probs_dropout_prob")
    classifier_dropout: float | None = _as_classify("classifier_dropout")
    freeze_embeddings: bool = _as_classify("freeze_embeddings")
    freeze_layers: int = _as_classify("freeze_layers")
    lora_r: int = _as_classify("lora_r")
    lora_alpha: float = _as_classify("lora_alpha")
    lora_dropout: float = _as_classify("lora_dropout")
    gradient_checkpointing: bool = _as_classify("gradient_checkpointing")
    unpad: bool = _as_classify("unpad")

    grid: str = setting(
        "none",
        "settings of which the best on the evaluation's examples is taken: those of BERT's numbers "
        "on GLUE (published, 4), or those its authors recommend (wide, 18)",
        TRAIN,
        choices=("none", *GRIDS),
    )
    num_train_epochs: float = _as_classify("num_train_epochs")
    max_steps: int = _as_classify("max_steps")
    per_device_train_batch_size: int = _as_classify("per_device_train_batch_size", default=32)
    gradient_accumulation_steps: int = _as_classify("gradient_accumulation_steps")
    learning_rate: float = _as_classify("learning_rate", default=2e-5)
    layerwise_lr_decay: float = _as_classify("layerwise_lr_decay")
    weight_decay: float = _as_classify("weight_decay")
    adam_beta1: float = _as_classify("adam_beta1")
    adam_beta2: float = _as_classify("adam_beta2")
    adam_epsilon: float = _as_classify("adam_epsilon")
    max_grad_norm: float = _as_classify("max_grad_norm")
    lr_scheduler_type: str = _as_classify("lr_scheduler_type")
    warmup_steps: int | float = _as_classify("warmup_steps")

    rdrop_alpha: float = _as_classify("rdrop_alpha")
    fgm_epsilon: float = _as_classify("fgm_epsilon")
    label_smoothing_factor: float = _as_classify("label_smoothing_factor")

    save_steps: int = _as_classify(
        "save_steps", help="steps between checkpoints (0 = after each epoch)"
    )
    logging_steps: int = _as_classify("logging_steps")
    report_to: str = _as_classify("report_to")

    def __post_init__(self) -> None:
        check_fields(self)
        check_not_empty(self, "out", "tasks")
        if not self.model:
            raise UserError("model = '': give --model DIR, the folder of a pre-trained model")
        if not self.data:
            raise UserError("data = '': give --data DIR, the folder that holds CoLA, SST-2 ...")
        self.classify(self.names[0], self.settings_tried[0], self.seed)

    @property
    def names(self) -> list[str]:
        """Of the tasks that were asked for.

        Raises:
            UserError: there is no such task.
        """
        if self.tasks == "all":
            return [*TASKS]
        by_folder = {folder: one.name for one in TASKS.values() for folder in one.folders}
        found = []
        for name in self.tasks.split(","):
            if plain(name) not in by_folder:
                near = did_you_mean(plain(name), by_folder) or f" (there are {', '.join(TASKS)})"
                raise UserError(f"tasks = {self.tasks!r}: GLUE has no {name!r}{near}")
            found.append(by_folder[plain(name)])
        return [name for name in TASKS if name in found]

    @property
    def settings_tried(self) -> list[dict[str, Any]]:
        """One a run of the first seed."""
        rates, batches, epochs = GRIDS.get(
            self.grid,
            ((self.learning_rate,), (self.per_device_train_batch_size,), (self.num_train_epochs,)),
        )
        names = ("learning_rate", "per_device_train_batch_size", "num_train_epochs")
        return [dict(zip(names, one, strict=True)) for one in product(rates, batches, epochs)]

    def classify(self, task: str, tried: dict[str, Any], seed: int) -> ClassifyConfig:
        """A run as `fastbert finetune classify` would be told: a fresh head, evaluated at its end.

        Args:
            task: one of `TASKS`.
            tried: one of `settings_tried`.
            seed: of the run.
        """
        names = {one.name for one in settings(ClassifyConfig)}
        shared = {
            one.name: getattr(self, one.name)
            for one in settings(type(self))
            if one.name in names and one.name not in ("tasks", "seeds")
        }
        made = ClassifyConfig(**shared, train=self.data, eval=self.data)
        score = not TASKS[task].labels
        without: dict[str, Any] = dict.fromkeys(OF_DISTRIBUTIONS, 0.0) if score else {}
        return replace(
            made,
            **tried,
            seed=seed,
            resume=True,
            new_head=True,
            eval_steps=_AT_THE_END,
            problem_type="regression" if score else "single_label_classification",
            entity_markers="none",
            metric_for_best_model=next(iter(TASKS[task].metrics)),
            **without,
        )


_AT_THE_END = 2**31 - 1
OF_DISTRIBUTIONS = {"rdrop_alpha": "R-Drop", "label_smoothing_factor": "label smoothing"}
"""What a score, which has none, is trained without."""

FREE = frozenset(
    {
        *("out", "resume", "data", "tasks", "device", "parallel", "num_threads", "seeds"),
        *("keep_models", "save_steps", "logging_steps", "report_to"),
    }
)
"""Settings that a command which goes on may change."""


def plain(name: str) -> str:
    """A task's or folder's name without case, dashes and spaces around."""
    return name.strip().casefold().replace("-", "").replace("_", "")
