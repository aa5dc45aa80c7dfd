"""Every error that dpbudget and dptrainer raise, in one tree.

::

    DPBudgetError                 base: message, hint, stable code, exit code of the command line
    ├── InvalidParameter          2   a value is out of its range or of the wrong kind
    ├── MissingExtra              2   an optional dependency is not installed
    ├── BudgetExceeded            3   the owner's budget does not allow it
    │   └── PlanExhausted         3   a step beyond the signed plan was asked for
    ├── NotComputable             6   no certified answer exists for this question
    ├── Unreadable                4   a file is missing, not ours, or of an unknown version
    │   └── UnsafeKeyFile         4   a private key that others could read or replace
    ├── Tampered                  1   bytes, chain, signature or arithmetic do not agree
    ├── Unanchored                5   valid, but the demanded outside anchor was not met
    ├── StorageFailed             4   the ledger could not make a spend durable; nothing was released
    └── PrivacyViolation          2   the training code would break the guarantee; it was stopped before release
        └── ReceiptSpent          2   a receipt was used twice, or in a forked process

Messages say what happened with the offending value; ``hint`` says the way out. Codes never change their meaning.
"""

from __future__ import annotations

from typing import ClassVar

#: What each stable code means, as ``dpbudget explain CODE`` prints it.
CODES: dict[str, str] = {
    "DP001": "Epsilon must be a finite number greater than 0. Epsilon 0 would mean that the model may not depend on "
    "the data at all.",
    "DP002": "Delta must lie strictly between 0 and 1. It bounds the probability that the epsilon guarantee fails "
    "outright, so it should be well below 1 / (number of people).",
    "DP003": "Delta is at least 1 / nominal size: a mechanism that publishes a whole random record would satisfy it. "
    "Choose a delta well below 1 / nominal size.",
    "DP004": "No noise multiplier up to 1e6 reaches the requested epsilon with this sampling rate and number of steps.",
    "DP005": "The noise multiplier (noise standard deviation / clipping norm) must be a finite number in [1e-3, 1e6].",
    "DP006": "Noise multiplier 0: epsilon is infinite and nothing is protected.",
    "DP007": "The clipping norm must be a finite number in (0, 1e12].",
    "DP008": "The sampling rate is the probability with which each record enters a batch, so it lies in (0, 1].",
    "DP009": "A count (steps, epochs, batch size, dataset size, parameters) must be a positive number in its range.",
    "DP010": "The model has a layer that mixes examples of a batch or keeps statistics of them, so that clipping each "
    "example's gradient no longer bounds its influence.",
    "DP011": "The optimizer holds parameters that do not belong to this model, or belongs to another model.",
    "DP012": "The optimizer leaves out parameters that still require a gradient.",
    "DP013": "A buffer is updated from private data without noise (running statistics, for example).",
    "DP014": "The model is in evaluation mode; per-example gradients of a training step need model.train().",
    "DP015": "A parameter received no gradient; it is updated by noise alone.",
    "DP016": "The device of the model cannot make noise: on a CUDA device Triton is missing or was refused, and other "
    "accelerators have no kernels. Nothing falls back to the CPU in silence.",
    "DP017": "The optimizer evaluates the loss several times per step; each evaluation would be a release of its own.",
    "DP018": "The model has no trainable parameter, more of them than the plan allows, or one of an unsupported kind.",
    "DP019": "A layer or parameter cannot be trained privately with the chosen engine.",
    "DP020": "A shuffled or sequential loader is not Poisson sampling, and its epsilon is larger.",
    "DP021": "A batch did not come from the private sampler of this run.",
    "DP022": "A weighted or custom sampler changes the privacy analysis and cannot be used.",
    "DP023": "A batch is not the one that the private sampler drew for this step.",
    "DP024": "Poisson sampling picks records by index, so it needs a map-style dataset.",
    "DP025": "The plan protects one example and the records of the dataset are users, or the other way round.",
    "DP026": "The plan samples records; a pass (DP-FTRL) samples none, but gives every record to one of its steps.",
    "DP030": "The loss does not give one value per example, or its reduction is not the declared one.",
    "DP031": "A backward pass ran outside the private step, or twice within it; its gradients are not clipped.",
    "DP032": "A private model was stepped by an optimizer that is not under the run's control; nothing was updated.",
    "DP033": "The output for one example changes when another example changes.",
    "DP034": "The optimizer was changed between two physical batches of one step. How many there are is private, so a "
    "schedule that counts them would depend on private data without noise.",
    "DP050": "The signed plan is used up. A further step would not be covered by the guarantee.",
    "DP051": "The weights and the ledger disagree about the private steps taken; the ledger decides what was spent.",
    "DP052": "The plan does not fit what is left of the owner's budget.",
    "DP053": "The plan's delta is too small for the noise mode: truncation of the noise would not be negligible.",
    "DP054": "The plan's noise is exact, and what was asked for keeps sums in floating point, or the other way round.",
    "DP060": "An unknown option, or a value of another kind than is wanted.",
    "DP061": "Unknown accountant.",
    "DP062": "The mechanism, sampling or adjacency is not supported by this accountant.",
    "DP063": "No certified answer: the accountant could not bound this question.",
    "DP064": "Too much or too little was given: an option or argument is missing, two of them say the same thing, or "
    "there is not exactly one unknown to solve for.",
    "DP065": "An option of Opacus that would break the guarantee, or that the facade does not have; the message says "
    "what to use in its place.",
    "DP070": "The file is not a dpbudget ledger or export, or cannot be read.",
    "DP071": "The ledger was changed, cut or damaged: bytes, chain, head, signature or rules do not agree.",
    "DP072": "The ledger is signed by a key that is not the trusted one.",
    "DP073": "A private key file could be read or replaced by others, so it is refused as ssh would.",
    "DP074": "A file would be overwritten.",
    "DP075": "The ledger could not make the spend durable. The step was not released; the budget may err upward.",
    "DP076": "A run, receipt or key was used in a forked process; parent and child would draw the same noise.",
    "DP077": "A receipt was used twice for the same purpose.",
    "DP078": "The run or ledger is closed, or another dpbudget train works on the same output, where both would write "
    "one checkpoint.",
    "DP079": "The ledger is valid, but the outside anchor that was demanded was not met.",
    "DP080": "The key cannot do this: roles are separate (owner grants, writer spends).",
    "DP081": "The ledger knows no plan or run of this name.",
    "DP082": "A record or number is not in the canonical form of the ledger format.",
    "DP083": "The ledger's store is unsafe (network file system, unexpected schema, symbolic link).",
    "DP084": "The noise key of the run is committed, and something that goes with it is missing or does not fit: the "
    "key itself, the auditor's entropy, or the outside anchor without which a copy would repeat noise.",
    "DP085": "There is no noise key for this step: it was not sealed, what is sealed does not open with this key or is "
    "not what the ledger commits to, or the step has no settle.",
    "DP090": "An optional dependency is missing.",
    "DP091": "The data file cannot be read or lacks what was asked for.",
    "DP092": "The configuration file cannot be read.",
    "DP093": "A model factory given by the user failed or returned something that is not a model.",
    "DP099": "An internal failure of this package. No step is released by it; what was charged stays charged.",
}

#: The way out of each code, in general; the hint of an error knows the case.
WAYS_OUT: dict[str, str] = {
    "DP001": "pass a positive number; 1 is strong, 3 common, 8 weak.",
    "DP002": "pass a number well below 1 / dataset size, such as 1e-5 for 60000 records.",
    "DP003": "take a delta well below 1 / dataset size; the default is 1 / dataset size^1.1.",
    "DP004": "take fewer steps, a smaller batch, a larger delta or a larger epsilon.",
    "DP005": "0.5 to 20 is usual; dpbudget calibrate finds the smallest that fits a budget.",
    "DP006": "let dpbudget calibrate choose the noise; train a baseline without privacy without this package.",
    "DP007": "begin with 1.0; it has no influence on epsilon.",
    "DP008": "pass batch size / dataset size, or both of them.",
    "DP009": "pass a positive whole number (epochs may be fractional); the message names which.",
    "DP010": "dptrainer.fix(model) replaces what can be replaced, batch norm by group norm for example.",
    "DP011": "build the optimizer from model.parameters() after the last change of the model.",
    "DP012": "give the optimizer every trainable parameter, or freeze the others with requires_grad_(False).",
    "DP013": "keep no running statistics; dptrainer.fix(model) turns off what it knows.",
    "DP014": "call model.train() before the loop, and after every evaluation.",
    "DP015": "freeze it with requires_grad_(False), or remove it.",
    "DP016": "pip install 'dpbudget[gpu]' on a CUDA machine, or pass noise=SecureNoise(generate_on_cpu=True).",
    "DP017": "take SGD or Adam, and call backward() yourself instead of passing a closure.",
    "DP018": "freeze parameters, or plan with max_parameters of at least what the model trains.",
    "DP019": "docs/what-trains.md says what does; dptrainer.fix(model) repairs some of it.",
    "DP020": "pass the dataset itself: the private loader draws its batches.",
    "DP021": "iterate over the loader of the newest make_private, and step once for each batch; evaluate under "
    "torch.no_grad().",
    "DP022": "leave the sampler out; weigh records in the loss by public numbers only.",
    "DP023": "take every batch whole and once; physical_batch_size splits it for small memory.",
    "DP024": "pass a dataset with __len__ and __getitem__.",
    "DP025": 'plan with unit="user" and wrap the dataset in dptrainer.UserDataset, or do neither.',
    "DP026": "calibrate with batch_size=dataset_size and steps=passes; PrivateTrainer takes plans that sample.",
    "DP030": 'declare what the criterion does: loss_reduction="mean", "sum" or "none".',
    "DP031": "add the losses of a batch, call backward() once, and reach the layers through model(...).",
    "DP032": "step the optimizer that make_private returned; loader.detach() frees the model after the run.",
    "DP033": "keep statistics over the batch, in-batch negatives and mixed rows out of model and loss.",
    "DP034": "advance the schedule only where loader.step_complete is true.",
    "DP050": "keep the model as it is, or sign another plan if dpbudget ledger show says that something is plannable.",
    "DP051": "load the checkpoint that belongs to this run, or begin with public weights.",
    "DP052": "take the plan that the message says would fit, or let the owner raise the total: dpbudget ledger grant.",
    "DP053": "take a larger delta or more noise, or a smaller max_parameters.",
    "DP054": "train exact plans with PrivateTrainer or dpbudget train; plan secure noise for everything else.",
    "DP060": "the message names the nearest known word; --help lists all of them.",
    "DP061": "choose prv or rdp; pld answers questions, and no plan claims it.",
    "DP062": "the message names the choices; a ledger has one adjacency and one unit, and its plans have the same.",
    "DP063": "try the accountant rdp, or a larger delta.",
    "DP064": "pass what the message names as missing, or leave out one of what it names as too many.",
    "DP065": "the message says what takes its place; docs/migrating-from-opacus.md lists every option.",
    "DP070": "check the path and its permissions; a new ledger is made by dpbudget ledger init, an export by ledger "
    "export.",
    "DP071": "go back to a copy whose head you know, and find out who wrote this one.",
    "DP072": "ask the owner for the public key by another way than the file.",
    "DP073": "chmod 600 the key, in a folder that only you can write; where others could read it, rotate it.",
    "DP074": "choose another path, or go on with what is there; nothing is ever overwritten.",
    "DP075": "make room or mend the disk, open the ledger again and start the run for the steps that are left.",
    "DP076": "start the run in the process that trains, after the fork.",
    "DP077": "ask the run for the next receipt; every step needs its own.",
    "DP078": "wait for the other process or pass another --output; a closed run is started again for the steps that "
    "are left.",
    "DP079": "get the ledger that the head belongs to; of a ledger that went on, the newest copy.",
    "DP080": "pass the key whose public half the message names.",
    "DP081": "dpbudget ledger runs lists the runs; dpbudget plan new signs one in.",
    "DP082": "pass what dpbudget printed or wrote, unchanged; write no records by hand.",
    "DP083": "keep the ledger on a local disk, or in PostgreSQL (docs/ledger-stores.md).",
    "DP084": "dpbudget ledger commit, then ledger entropy; then start the run with its key file and the newest head "
    "that you know.",
    "DP085": "ask for steps that are settled, with the file and the auditor's key that the run was started with.",
    "DP090": "pip install what the message names, such as 'dpbudget[train]'.",
    "DP091": "the message names the file, and the column or array that is wanted.",
    "DP092": "mend or remove [tool.dpbudget] in pyproject.toml, or dpbudget.toml.",
    "DP093": "the factory is called as factory(features, classes) and returns a torch.nn.Module.",
    "DP099": "report it with the traceback that DPBUDGET_TRACEBACK=1 shows.",
}


class DPBudgetWarning(UserWarning):
    """What is allowed and probably not meant: a delta that protects nobody, a model or loss that could not be tested.

    ``warnings.simplefilter("error", dpbudget.DPBudgetWarning)`` turns all of it into exceptions.
    """


class DPBudgetError(Exception):
    """Base of all errors: what happened, with its numbers; ``hint`` is the way out.

    Attributes:
        code: stable code, a key of :data:`CODES`.
        hint: one sentence that says how to go on; empty where there is none.
        exit_code: exit code of the command line (class attribute).
    """

    exit_code: ClassVar[int] = 2
    default_code: ClassVar[str] = "DP060"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        text = f"{self.code} {self.message}"
        return f"{text} Fix: {self.hint}" if self.hint else text


class InvalidParameter(DPBudgetError, ValueError):
    """A value is out of range or of the wrong kind; nothing was computed or changed."""

    default_code = "DP009"


class MissingExtra(DPBudgetError, ImportError):
    """An optional dependency is not installed; the hint names the extra."""

    default_code = "DP090"


class BudgetExceeded(DPBudgetError):
    """The owner's budget does not allow it; nothing was charged."""

    exit_code = 3
    default_code = "DP052"


class PlanExhausted(BudgetExceeded):
    """A step beyond the signed plan was asked for; the model is unchanged."""

    default_code = "DP050"


class NotComputable(DPBudgetError, ArithmeticError):
    """No certified answer exists for this question with this accountant."""

    exit_code = 6
    default_code = "DP063"


class Unreadable(DPBudgetError):
    """A file is missing, not ours, or of an unknown version; nothing was written."""

    exit_code = 4
    default_code = "DP070"


class UnsafeKeyFile(Unreadable):
    """A private key file that others could read or replace."""

    default_code = "DP073"


class Tampered(DPBudgetError):
    """Bytes, chain, signature or rules do not agree."""

    exit_code = 1
    default_code = "DP071"


class Unanchored(DPBudgetError):
    """The ledger is valid in itself, but the demanded outside anchor was not met."""

    exit_code = 5
    default_code = "DP079"


class StorageFailed(DPBudgetError, OSError):
    """A spend could not be made durable; nothing was released and the process will not retry."""

    exit_code = 4
    default_code = "DP075"


class PrivacyViolation(DPBudgetError):
    """The training code would break the guarantee; it was stopped before any release."""

    default_code = "DP031"


class ReceiptSpent(PrivacyViolation):
    """A receipt was used twice for one purpose, or in a forked process."""

    default_code = "DP077"
