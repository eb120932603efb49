"""What fine-tuning can be told; each task adds its own. Names are `TrainingArguments`'."""

from dataclasses import dataclass
from typing import ClassVar

from fastbert.config import (
    device_setting,
    num_threads_setting,
    precision_setting,
    seed_setting,
    steps_of,
)
from fastbert.errors import UserError
from fastbert.settings import (
    LONGEST,
    MOST,
    MOST_DROPOUT,
    MOST_STEPS,
    Config,
    Group,
    check_fields,
    check_not_empty,
    checked,
    setting,
    settings,
)

DEMO = "demo"
"""As `train`: examples out of the sources that every Python carries."""
DEMOS = ("classify", "tag", "answer")

RUN = Group("run", "where and on what it runs")
DATA = Group("data", "labelled examples, and which column is what")
MODEL = Group("model", "what is trained of it, and its dropout")
TRAIN = Group("train", "the optimizer and its schedule")
REGULARIZE = Group("regularize", "against fitting the training examples too well")
SEARCH = Group("search", "by Optuna, on the evaluation's examples")
LOGS = Group("logs", "what is reported, evaluated and kept")


def _column(what: str) -> str:
    return setting("", f"{what} (empty = found by name or content, and said)", DATA)


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """What every task can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    command: ClassVar[str] = "finetune"
    task: ClassVar[str] = ""
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """What `metric_for_best_model` may be, of one kind of labels or another."""

    model: str = setting(
        "",
        "folder of a pre-trained model, or of a run (none is downloaded)",
        RUN,
        aka=("model_name_or_path", "model_name", "init_from", "checkpoint"),
    )
    train: str = setting(
        "",
        f"file, folder or glob of training examples ({DEMO} = made of Python's own sources)",
        RUN,
        aka=("train_file", "data", "dataset"),
    )
    eval: str = setting(
        "0.1",
        "file of examples to evaluate with, or the share of train that is split off",
        RUN,
        number_too=True,
        aka=("eval_file", "validation_file", "dev", "test", "validation_fraction"),
    )
    out: str = setting(
        "auto",
        "folder of the run (auto = the next free runs/finetune-001 ...)",
        RUN,
        aka=("output_dir", "output", "save_dir"),
    )
    device: str = device_setting(RUN)
    seed: int = seed_setting(RUN, "the head's weights, data order, dropout and the split")
    seeds: int = setting(
        1, "runs with seed, seed + 1, ...: mean and deviation are told", RUN, at_least=1, at_most=99
    )
    resume: bool = setting(
        False,
        "go on where out's last run was killed",
        RUN,
        aka=("resume_from_checkpoint",),
    )
    precision: str = precision_setting(
        RUN, ("auto", "fp32", "bf16", "fp16"), otherwise=", on a CPU fp32"
    )
    num_threads: int = num_threads_setting(RUN)

    format: str = setting(
        "auto",
        "of the files (auto = by content)",
        DATA,
        choices=("auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "text"),
    )
    header: str = setting(
        "auto",
        "whether CSV and TSV files begin with the names of columns (auto = by content)",
        DATA,
        choices=("auto", "yes", "no"),
    )
    max_seq_length: int | None = setting(
        None,
        "longest sequence, tokens (none = the task's, at most the model's)",
        DATA,
        at_least=8,
        at_most=LONGEST,
        aka=("max_length", "max_len", "seq_length", "seq_len"),
    )

    new_head: bool = setting(
        False, "begin with a fresh head where the model has one for other labels", MODEL
    )
    hidden_dropout_prob: float | None = setting(
        None, "dropout of hidden states (none = the model's)", MODEL, at_least=0,
        at_most=MOST_DROPOUT,
    )  # fmt: skip
    attention_probs_dropout_prob: float | None = setting(
        None, "dropout of attention probabilities (none = the model's)", MODEL, at_least=0,
        at_most=MOST_DROPOUT,
    )  # fmt: skip
    classifier_dropout: float | None = setting(
        None, "dropout before the head (none = the model's)", MODEL, at_least=0,
        at_most=MOST_DROPOUT,
    )  # fmt: skip
    freeze_embeddings: bool = setting(False, "train no embedding", MODEL)
    freeze_layers: int = setting(
        0, "train neither embeddings nor this many first layers", MODEL, at_least=0, at_most=1000
    )
    lora_r: int = setting(
        0, "rank of LoRA's adapters; only they and the head are trained (0 = off)", MODEL,
        at_least=0, at_most=2**12, aka=("lora", "lora_rank"),
    )  # fmt: skip
    lora_alpha: float = setting(16.0, "of LoRA: adapters count alpha / r", MODEL, more_than=0)
    lora_dropout: float = setting(
        0.0, "of LoRA: dropout before adapters", MODEL, at_least=0, at_most=MOST_DROPOUT
    )
    gradient_checkpointing: bool = setting(
        False, "compute layers again in the backward: less memory, a third more time", MODEL
    )
    unpad: bool = setting(
        True, "compute no padding (no = as transformers does, to the last bit of its loss)", MODEL
    )

    num_train_epochs: float = setting(
        3.0, "times that each example is seen", TRAIN, more_than=0, at_most=10**6,
        aka=("epochs", "num_epochs"),
    )  # fmt: skip
    max_steps: int = setting(
        0, "optimizer steps (0 = as num_train_epochs says)", TRAIN, at_least=0, at_most=MOST_STEPS
    )
    per_device_train_batch_size: int = setting(
        16, "examples of one forward and backward pass", TRAIN, at_least=1, at_most=2**20,
        aka=("batch_size", "train_batch_size"),
    )  # fmt: skip
    gradient_accumulation_steps: int = setting(
        1, "batches per optimizer step", TRAIN, at_least=1, at_most=2**16,
        aka=("grad_accum", "grad_accum_steps", "accumulation_steps"),
    )  # fmt: skip
    learning_rate: float = setting(
        5e-5, "peak learning rate", TRAIN, more_than=0, at_most=1000, aka=("lr", "peak_lr")
    )
    layerwise_lr_decay: float = setting(
        1.0, "learning rate of each layer over the one above it", TRAIN, more_than=0, at_most=1,
        aka=("llrd", "layer_decay", "lr_decay"),
    )  # fmt: skip
    weight_decay: float = setting(
        0.01, "decay of weights, not of biases and LayerNorm", TRAIN, at_least=0, at_most=1000
    )
    adam_beta1: float = setting(0.9, "decay of the first moment", TRAIN, at_least=0, less_than=1)
    adam_beta2: float = setting(0.999, "decay of the second moment", TRAIN, at_least=0, less_than=1)
    adam_epsilon: float = setting(
        1e-8, "added to the root of the second moment", TRAIN, at_least=1e-30, at_most=1000
    )
    max_grad_norm: float = setting(
        1.0, "clip the gradient to this norm (0 = off)", TRAIN, at_least=0, at_most=1e30
    )
    lr_scheduler_type: str = setting(
        "linear", "shape of the learning rate after warm-up", TRAIN,
        choices=("linear", "cosine", "constant"), aka=("scheduler", "lr_scheduler"),
    )  # fmt: skip
    warmup_steps: int | float = setting(
        0.1, "steps over which the learning rate rises, or their share of all", TRAIN,
        at_least=0, at_most=MOST, aka=("warmup", "warmup_ratio"), share_too=True,
    )  # fmt: skip

    rdrop_alpha: float = setting(
        0.0, "R-Drop: weight of the divergence of two forwards (0 = off)", REGULARIZE,
        at_least=0, at_most=1000,
    )  # fmt: skip
    fgm_epsilon: float = setting(
        0.0, "FGM: length of the adversarial step of the embeddings (0 = off)", REGULARIZE,
        at_least=0, at_most=1000, aka=("adversarial", "fgm"),
    )  # fmt: skip
    early_stopping_patience: int = setting(
        0, "evaluations without a better metric that end the run (0 = off)", REGULARIZE,
        at_least=0, at_most=MOST,
    )  # fmt: skip

    search: int = setting(
        0, "runs that look for the best of the three settings below (0 = off)", SEARCH,
        at_least=0, at_most=10**4, aka=("n_trials", "hp_search", "trials"),
    )  # fmt: skip
    search_learning_rate: str = setting(
        "1e-5,1e-4", "bounds of learning_rate, looked for on a logarithmic scale", SEARCH
    )
    search_epochs: str = setting("2,3,4", "values of num_train_epochs", SEARCH)
    search_batch_sizes: str = setting("16,32", "values of per_device_train_batch_size", SEARCH)

    metric_for_best_model: str = setting(
        "auto", "metric by which the best model is chosen, and kept", LOGS
    )
    eval_steps: int = setting(
        0, "steps between evaluations (0 = after each epoch)", LOGS, at_least=0, at_most=MOST
    )
    save_steps: int = setting(
        0,
        "steps between checkpoints, beside those of a new best (0 = at each evaluation)",
        LOGS,
        at_least=0,
        at_most=MOST,
    )
    logging_steps: int = setting(10, "steps between log lines", LOGS, at_least=1, at_most=MOST)
    report_to: str = setting(
        "tensorboard", "where curves go beside the log", LOGS,
        choices=("tensorboard", "wandb", "none"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        check_not_empty(self, "out")
        if self.train == DEMO and self.task not in DEMOS:
            raise UserError(f"train = {DEMO!r}: there is one of {', '.join(DEMOS)} only")
        if self.train == DEMO and (self.search or self.seeds > 1):
            raise UserError(f"train = {DEMO!r} is one run: leave --seeds and --search out")
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise UserError(f"eval = {self.eval}: a share must be more than 0 and less than 1")
        known = ("auto", *self.metrics)
        if self.metric_for_best_model not in known:
            raise UserError(
                f"metric_for_best_model = {self.metric_for_best_model!r} must be one of "
                f"{', '.join(known)}"
            )
        if self.lora_r and (self.freeze_layers or self.freeze_embeddings):
            raise UserError("lora_r trains nothing but adapters and head: leave freeze_* out")
        if self.fgm_epsilon and (self.freeze_layers or self.freeze_embeddings or self.lora_r):
            raise UserError("fgm_epsilon moves embeddings that are trained: leave it out")
        if self.lora_r and self.layerwise_lr_decay != 1.0:
            raise UserError("layerwise_lr_decay: adapters of LoRA have one rate: leave it out")
        if self.search and self.max_steps:
            raise UserError("max_steps: a search tries num_train_epochs: leave it out")
        if self.search and self.seeds > 1:
            raise UserError("search and seeds: look for settings first, then give them and --seeds")
        rates = self.search_space["learning_rate"]
        if len(rates) != 2 or rates[0] > rates[1]:
            raise UserError(
                f"search_learning_rate = {self.search_learning_rate!r} must be LOW,HIGH"
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise UserError("precision = 'fp16' needs a GPU: use bf16 or fp32")

    def check_given(self) -> None:
        """Checks that what has no default is there; --print-config does without.

        Raises:
            UserError: it is not.
        """
        for name, value in (("model", self.model), ("train", self.train), ("eval", self.eval)):
            if not value:
                raise UserError(
                    f"{name} = '': give fastbert finetune {self.task} --model DIR --train FILE "
                    "[--eval FILE or a share]"
                )

    @property
    def eval_share(self) -> float | None:
        """The share of train to split off; None where `eval` is a file."""
        try:
            return float(self.eval)
        except ValueError:
            return None

    @property
    def search_space(self) -> dict[str, list[float]]:
        """Bounds of the learning rate, and values of the other two.

        Raises:
            UserError: one is no number, or out of bounds.
        """
        names = ("learning_rate", "num_train_epochs", "per_device_train_batch_size")
        given = (self.search_learning_rate, self.search_epochs, self.search_batch_sizes)
        known = {one.name: one for one in settings(type(self))}
        found: dict[str, list[float]] = {}
        for name, text in zip(names, given, strict=True):
            try:
                values = [known[name].type(part) for part in text.split(",")]
            except ValueError:
                raise UserError(
                    f"the values of {name} to search, {text!r}, must be numbers with commas between"
                ) from None
            found[name] = [checked(known[name], value, "search: ") for value in values]
        return found

    def rising_steps(self, total: int) -> int:
        """Steps of the warm-up, of `total`."""
        return steps_of(self.warmup_steps, total)


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    """A label for a text or a pair: one, several, or a number."""

    task: ClassVar[str] = "classify"
    metrics: ClassVar[tuple[str, ...]] = (
        *("accuracy", "macro_f1", "weighted_f1", "matthews", "balanced_accuracy"),
        *("macro_precision", "macro_recall", "weighted_precision", "weighted_recall"),
        *("micro_f1", "micro_precision", "micro_recall"),
        *("f1", "precision", "recall", "average_precision", "roc_auc"),
        *("samples_f1", "subset_accuracy", "pearson", "spearman", "mse", "mae", "r2"),
        *("expected_calibration_error", "brier_score", "loss"),
    )
    text_column: str = _column("column of the text")
    text_pair_column: str = _column("column of a second text, for pairs")
    label_column: str = _column("column of the label")
    problem_type: str = setting(
        "auto", "what a label is (auto = by its values)", DATA,
        choices=(
            *("auto", "single_label_classification", "multi_label_classification"),
            "regression",
        ),
    )  # fmt: skip
    label_separator: str = setting(
        "", "between several labels in a field of text: | or , or ; (empty = one label)", DATA
    )
    entity_markers: str = setting(
        "auto",
        "marks around entities, for relations: <e1>,</e1>,... become tokens (auto = if they occur)",
        DATA,
    )
    threshold: float = setting(
        0.5, "of several labels: probability from which one is given", DATA, more_than=0,
        less_than=1,
    )  # fmt: skip
    class_weight: str = setting(
        "none", "of the loss (balanced = inverse to a class's examples)", REGULARIZE,
        choices=("none", "balanced"),
    )  # fmt: skip
    label_smoothing_factor: float = setting(
        0.0, "share of a label's probability that is spread over all", REGULARIZE, at_least=0,
        less_than=1, aka=("label_smoothing",),
    )  # fmt: skip
    augment: float = setting(
        0.0, "examples added with words replaced by the model itself, over those given",
        REGULARIZE, at_least=0, at_most=100,
    )  # fmt: skip


@dataclass(frozen=True)
class TagConfig(FinetuneConfig):
    """A tag for each word: entities, parts of speech."""

    task: ClassVar[str] = "tag"
    metrics: ClassVar[tuple[str, ...]] = (
        *("f1", "precision", "recall", "macro_f1", "macro_precision", "macro_recall"),
        *("weighted_f1", "weighted_precision", "weighted_recall", "accuracy", "matthews"),
        *("balanced_accuracy", "micro_f1", "micro_precision", "micro_recall"),
        *("expected_calibration_error", "loss"),
    )
    tokens_column: str = _column("column of the words, a list")
    tags_column: str = _column("column of the tags, a list")
    class_weight: str = setting(
        "none", "of the loss (balanced = inverse to a tag's words)", REGULARIZE,
        choices=("none", "balanced"),
    )  # fmt: skip
    label_smoothing_factor: float = setting(
        0.0, "share of a tag's probability that is spread over all", REGULARIZE, at_least=0,
        less_than=1, aka=("label_smoothing",),
    )  # fmt: skip
    doc_stride: int = setting(
        64, "words' pieces shared by two windows of a long text", DATA, at_least=0, at_most=LONGEST
    )


@dataclass(frozen=True)
class AnswerConfig(FinetuneConfig):
    """The span of a paragraph that answers a question."""

    task: ClassVar[str] = "answer"
    metrics: ClassVar[tuple[str, ...]] = (
        *("f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_f1"),
        *("no_answer_exact_match", "best_f1", "best_exact", "loss"),
    )
    question_column: str = _column("column of the question")
    context_column: str = _column("column of the paragraph")
    answers_column: str = _column("column of the answers, with texts and starts")
    doc_stride: int = setting(
        128, "pieces shared by two windows of a long paragraph", DATA, at_least=0, at_most=LONGEST
    )
    max_answer_length: int = setting(
        30, "pieces of an answer at most", DATA, at_least=1, at_most=LONGEST
    )
    n_best: int = setting(20, "starts and ends considered", DATA, at_least=1, at_most=1000)


@dataclass(frozen=True)
class ChooseConfig(FinetuneConfig):
    """The right one among several answers."""

    task: ClassVar[str] = "choose"
    metrics: ClassVar[tuple[str, ...]] = (
        *("accuracy", "expected_calibration_error", "brier_score", "loss"),
    )
    context_column: str = _column("column of the text before the choices")
    question_column: str = _column("column of the question, or of the choices' common beginning")
    choices_columns: str = _column("column of the list of choices, or columns of one each: a,b,c")
    label_column: str = _column("column of the right one: number, letter or text")


@dataclass(frozen=True)
class EmbedConfig(FinetuneConfig):
    """Vectors that lie near each other for texts that belong together."""

    task: ClassVar[str] = "embed"
    metrics: ClassVar[tuple[str, ...]] = (
        *("mrr_at_10", "accuracy_at_1", "accuracy_at_3", "accuracy_at_10", "spearman", "pearson"),
        "loss",
    )
    text_column: str = _column("column of the first text")
    text_pair_column: str = _column("column of the one that belongs to it")
    negative_column: str = _column("column of one that does not belong to it")
    score_column: str = _column("column of their similarity, instead of in-batch negatives")
    pooling: str = setting(
        "auto", "how tokens become a vector (auto = as the model's folder says, or mean)",
        MODEL, choices=("auto", "mean", "cls"),
    )  # fmt: skip
    scale: float = setting(
        20.0, "of the cosines in the loss of in-batch negatives: 1 / temperature", TRAIN,
        more_than=0, at_most=1000,
    )  # fmt: skip


CONFIGS = {
    config.task: config
    for config in (ClassifyConfig, TagConfig, AnswerConfig, ChooseConfig, EmbedConfig)
}
