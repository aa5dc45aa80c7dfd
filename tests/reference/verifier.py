"""A second verifier of ledgers, written from docs/ledger-format.md: the standard library and Ed25519, nothing else.

``python tests/reference/verifier.py EXPORT OWNER_HEX`` prints what the ledger says was spent, or ends in an exception.
It checks every rule of the page; it does not recompute epsilon, which takes an accountant."""

# fmt: off
import base64
import hashlib
import json
import re
import sys
from fractions import Fraction
from itertools import accumulate, pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

P, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
Y8, D = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7, -121665 * pow(121666, -1, P)
FLOAT = re.compile(r"0x0\.0p\+0|-?0x[01]\.[0-9a-f]{13}p[+-](0|[1-9][0-9]{0,3})")
SEALED, STATEMENT = "application/vnd.dpbudget.record.v1+json", "application/vnd.in-toto+json"
SIGNED = ("genesis", "renyi", "budget", "rekey", "portfolio")
def need(condition, why):
    if not condition:
        raise ValueError(why)
def number(text):
    need(isinstance(text, str) and FLOAT.fullmatch(text) and float.fromhex(text).hex() == text, "float")
    return Fraction(float.fromhex(text))
def kind(a): return lambda v: type(v) is a
def null(form): return lambda v: v is None or form(v)
def text(*forms): return lambda v: isinstance(v, str) and any(re.fullmatch(form, v) for form in forms)
def whole(low, high): return lambda v: type(v) is int and low <= v <= high
def real(low, high, *never): return lambda v: low <= number(v) <= high and number(v) not in never
def many(form): return lambda v: isinstance(v, list) and 1 <= len(v) <= 64 and all(map(form, v))
H64, H32, STEP, COUNT = text("[0-9a-f]{64}"), text("[0-9a-f]{32}"), whole(0, 1024 * 10**9), whole(1, 1024 * 10**9)
EPSILON, DELTA, ALLOWED = real(0, 10**6, 0), real(0, 1, 0, 1), many(real(-Fraction(1e300), 10**6))
SAME = {"adjacency": text("add-remove", "zero-out", "replace-one"), "unit": text("example", "user")}
FORMS = {
    "genesis": {**SAME, "dataset": H64, "epsilon": EPSILON, "delta": DELTA, "owner": H64, "writer": H64,
                "filter": text("portfolio", "rdp"), "public_data": kind(bool)},
    "renyi": {"orders": many(real(1, 10**6, 1)), "shares": many(whole(1, 10**6)), "allowances": ALLOWED},
    "budget": {"epsilon": EPSILON, "delta": DELTA, "allowances": null(ALLOWED)},
    "rekey": {"role": text("owner", "writer"), "old": H64, "key": H64},
    "note": {"event": text("checked", "published", "restored", "imported", "incident", "retired")},
    "portfolio": {"index": whole(1, 10000), "delta": DELTA, "epsilon": null(EPSILON)},
    "plan": {"run": H32, "statement": H64, "portfolio": whole(0, 10000)},
    "commit": {"run": H32, "commitment": H64}, "entropy": {"run": H32, "value": H64},
    "lease": {"run": H32, "nonce": H64, "commitment": H64, "first": STEP, "count": COUNT, "claim": null(real(0, 1e6))},
    "reserve": {"run": H32, "step": STEP, "count": COUNT},
    "settle": {"run": H32, "step": STEP, "fresh": H32, "output": null(H64)},
    "close": {"run": H32, "first": STEP, "unspent": STEP}}
PLAN = {**SAME, "phases": kind(list), "clip_norm": real(0, 10**12, 0), "sampling": text("poisson"), "claim": kind(dict),
        "nominal_size": whole(1, 10**12), "noise": text("secure", "exact"), "max_parameters": whole(1, 2**40),
        "model_digest": null(H64), "code_digest": null(H64)}
TABLE = {"costs": kind(list), "tails": kind(list), "factors": kind(list)}
PHASE = {"rate_k": text("[01][0-9a-f]{16}"), "noise_multiplier": real(Fraction(1e-3), 10**6), "steps": whole(1, 10**9)}
CLAIM = {"epsilon": lambda v: number(v) >= 0, "delta": DELTA, "accountant": text("prv", "rdp"),
         "accountant_version": whole(1, 10**6)}
def fields(value, forms):
    need(isinstance(value, dict) and set(value) == set(forms), "fields")
    need(all(form(value[name]) for name, form in forms.items()), "value")
    return value
def parse(line, most=4096):
    value = json.loads(line.decode("ascii")) if len(line) <= most else None
    need(json.dumps(value, sort_keys=True, separators=(",", ":")).encode() == line, "canonical form")
    return value
def unbase64(text):
    need(base64.b64encode(base64.b64decode(text)).decode() == text, "base64")
    return base64.b64decode(text)
def key_of(digits):
    y = int.from_bytes(bytes.fromhex(digits), "little") % 2**255
    square = (y * y - 1) * pow(D * y * y + 1, -1, P)
    need(y < P and y not in (0, 1, P - 1, Y8, P - Y8) and pow(square, P // 2, P) == 1, "key")
    return bytes.fromhex(digits)
def check_signature(raw, signature, message):
    need(len(signature) == 64 and int.from_bytes(signature[32:], "little") < ORDER, "signature")
    Ed25519PublicKey.from_public_bytes(raw).verify(signature, message)
def unseal(envelope, name, *signers):
    forms = {"payload": kind(str), "payloadType": text(re.escape(name)), "signatures": kind(list)}
    value = fields(parse(envelope, 1399128), forms)
    payload = unbase64(value["payload"])
    message = b"DSSEv1 %d %s %d %s" % (len(name), name.encode(), len(payload), payload)
    for given, allowed in zip(value["signatures"], signers, strict=True):
        fields(given, {"keyid": H64, "sig": kind(str)})
        (key,) = [raw for raw in allowed if hashlib.sha256(raw).hexdigest() == given["keyid"]]
        check_signature(key, unbase64(given["sig"]), message)
    return payload
def root_of(hashes):
    half = 1 << (len(hashes) - 1).bit_length() - 1 if len(hashes) > 1 else 0
    return hashlib.sha256(b"\x01" + root_of(hashes[:half]) + root_of(hashes[half:])).digest() if half else hashes[0]
class Ledger:
    hashes, portfolios, runs, drawn, allowances, phases = (), (), None, (), None, 0
    def read(self, line, envelopes):
        r, seq = parse(line), len(self.hashes)
        fields(r, {"v": whole(1, 1), "type": kind(str), "seq": whole(seq, seq), "prev": H64, **FORMS[r["type"]]})
        need(r["prev"] == (self.hashes[-1].hex() if seq else "0" * 64) and (r["type"] == "genesis") == (seq < 1), "")
        need((r["type"] == "renyi") == (seq == 1 and self.facts["filter"] == "rdp"), "the second record")
        self.hashes = [*self.hashes, hashlib.sha256(b"\x00" + line).digest()]
        if r["type"] == "genesis":
            self.facts, self.owners, self.writers, self.runs = r, [key_of(r["owner"])], [key_of(r["writer"])], {}
            need(self.owners != self.writers, "two keys")
        if r["type"] in ("genesis", "budget"):
            self.epsilon, self.delta = number(r["epsilon"]), number(r["delta"])
        new = [[key_of(r["key"])]] if r["type"] == "rekey" else []
        signers = [self.owners[-1:] + self.writers[-1:] * (r.get("role") == "writer"), *new]
        need(r["type"] not in SIGNED or unseal(next(envelopes), SEALED, *signers) == line, "sealed line")
        r["payload"] = unseal(next(envelopes), STATEMENT, *signers) if r["type"] == "plan" else b""
        getattr(self, r["type"], lambda _: None)(r)
    def renyi(self, r):
        orders, self.allowances = list(map(number, r["orders"])), list(map(number, r["allowances"]))
        need(sorted({*orders}) == orders and len(orders) == len(r["shares"]) == len(r["allowances"]), "renyi")
    def budget(self, r):
        need(len(r["allowances"] or ()) == len(self.allowances or ()), "lengths")
        self.allowances = r["allowances"] and list(map(number, r["allowances"]))
        self.check_totals()
    def rekey(self, r):
        keys, new = self.owners if r["role"] == "owner" else self.writers, key_of(r["key"])
        need(r["old"] == keys[-1].hex() and new not in self.owners + self.writers, "rekey")
        keys.append(new)
    def portfolio(self, r):
        need(self.facts["filter"] == "portfolio" and r["index"] == len(self.portfolios) + 1, "portfolio")
        need(all(p["claim"] is not None for p in self.portfolios), "the one before is not frozen")
        self.portfolios += ({"claim": None, **{n: r[n] and number(r[n]) for n in ("delta", "epsilon")}},)
        self.check_totals()
    def plan(self, r):
        rdp, most = self.facts["filter"] == "rdp", min(32768, 10**6 // len(self.allowances or "1"))
        named = [{"name": "dpbudget-run/" + r["run"], "digest": {"sha256": self.hashes[0].hex()}}]
        kinds = text("https://in-toto.io/Statement/v1"), text(f"urn:dpbudget:{'rdp-' * rdp}plan:v1")
        forms = {"_type": kinds[0], "predicateType": kinds[1], "predicate": kind(dict), "subject": lambda v: v == named}
        plan = fields(fields(parse(r["payload"], 1 << 20), forms)["predicate"], {**PLAN, **(TABLE if rdp else {})})
        need(hashlib.sha256(r["payload"]).hexdigest() == r["statement"], "statement")
        rates = [int(fields(phase, PHASE)["rate_k"], 16) for phase in plan["phases"]]
        self.phases += len(rates)
        need(1 <= len(rates) <= 1024 and all(1 <= k <= 2**64 and int(float(k)) == k for k in rates), "phases")
        need(all(plan[name] == self.facts[name] for name in SAME) and fields(plan["claim"], CLAIM), "neighbours")
        need(r["run"] not in self.runs and len(self.runs) < 10000 and self.phases <= most, "runs, phases")
        ends, own = [0, *accumulate(p["steps"] for p in plan["phases"])], {"claim": 0} if rdp else self.portfolios[-1]
        need(rdp or (own["claim"] is None and number(plan["claim"]["delta"]) == own["delta"]), "portfolio")
        run = self.runs[r["run"]] = {"ends": ends, "charged": 0, "leases": [], "costs": [], "in": own, "noise": []}
        for row, *tails in zip(*(plan[name] for name in TABLE), strict=True) if rdp else ():
            costs = [None if c is None else number(c) * 2**100 for c in row] + [number(c) * 2**200 for c in tails]
            need(kind(list)(row) and len(row) == len(self.allowances) and all((c or 0) >= 0 for c in costs), "costs")
            run["costs"].append(costs)
        need(r["portfolio"] == len(self.portfolios) and len(run["costs"]) == len(rates) * rdp, "portfolio, table")
    def check_totals(self):  # rules 3, 4, 7, 10
        taken = (p["epsilon"] or 0 if p["claim"] is None else p["claim"] for p in self.portfolios)
        need(sum(taken) <= self.epsilon and sum(p["delta"] for p in self.portfolios) <= self.delta, "beyond the total")
        if self.allowances is not None:
            bounds = [*(a * 2**100 for a in self.allowances), self.delta * 2**200 / 100, Fraction(2**200, 100)]
            sums = [0] * len(bounds)
            for run in self.runs.values():
                for (start, end), costs in zip(pairwise(run["ends"]), run["costs"], strict=True):
                    used = min(max(run["charged"] - start, 0), end - start)
                    for at, cost in enumerate(costs if used else ()):
                        sums[at] = None if None in (cost, sums[at]) else sums[at] - (-used * cost // 1)
            fits = [spent is not None and spent <= bound // 1 for spent, bound in zip(sums, bounds, strict=True)]
            need(any(fits[:-2]) and all(fits[-2:]), "no order has room")
    def commit(self, r):
        run = self.runs[r["run"]]
        need(not run["noise"] and not run["charged"], "commit")
        run["noise"], self.drawn = [r["commitment"]], [*self.drawn, "c" + r["commitment"]]
    def entropy(self, r):
        need(len(self.runs[r["run"]]["noise"]) == 1, "entropy")
        self.runs[r["run"]]["noise"].append(r["value"])
    def lease(self, r):
        run = self.runs[r["run"]]
        need(run["noise"][:1] in ([], [r["commitment"]]) and len(run["noise"]) != 1, "committed")
        need(r["first"] == run["charged"] and r["first"] + r["count"] <= run["ends"][-1], "lease")
        need((r["claim"] is None) == (run["in"]["claim"] is not None), "claim")
        if r["claim"] is not None:
            run["in"]["claim"] = number(r["claim"])
            need(run["in"]["epsilon"] is None or run["in"]["claim"] <= run["in"]["epsilon"], "declared epsilon")
        run["charged"] += r["count"]
        run["leases"].append({"first": r["first"], "next": r["first"], "done": r["first"] - 1, "end": run["charged"]})
        self.drawn = [*self.drawn, "n" + r["nonce"], *["c" + r["commitment"]] * (not run["noise"])]
        self.check_totals()
    def step(self, r):
        step, leases, fixed = r["step" if "step" in r else "first"], *map(self.runs[r["run"]].get, ("leases", "noise"))
        (lease,) = [held for held in leases if held["first"] <= step < held["end"]]
        if r["type"] == "reserve":
            need(step == lease["next"] and step + r["count"] <= lease["end"], "reserve")
            lease["next"] += r["count"]
        elif r["type"] == "settle":
            need(lease["done"] < step < lease["next"] and (not fixed or r["fresh"] == "0" * 32), "settle")
            lease["done"], self.drawn = step, [*self.drawn, *["f" + r["fresh"]] * (not fixed)]
        else:
            need(step == lease["first"] and r["unspent"] == lease["end"] - lease["next"], "close")
        if r["type"] == "close" or lease["done"] == lease["end"] - 1:
            leases.remove(lease)
    reserve = settle = close = step
def verify(export, owner):
    """What the ledger of an export says, under the trusted key ``owner`` of 32 bytes; else an exception."""
    lines, ledger = iter(export.split(b"\n")), Ledger()
    while not (line := next(lines)).startswith(b'{"note":'):
        ledger.read(line, lines)
    note = unbase64(fields(parse(line), {"note": kind(str)})["note"]).decode()
    need(list(lines) == [b""] and len(export) <= 2**30, "bytes")
    need(len(set(ledger.drawn)) == len(ledger.drawn) and owner in ledger.owners, "the whole")
    origin, root, writer = "dpbudget.ledger/" + ledger.hashes[0].hex()[:16], root_of(ledger.hashes), ledger.writers[-1]
    said = f"{origin}\n{len(ledger.hashes)}\n{base64.b64encode(root).decode()}\n"
    blob = unbase64(note.removeprefix(f"{said}\n— {origin} ").removesuffix("\n"))
    need(note == f"{said}\n— {origin} {base64.b64encode(blob).decode()}\n", "head")
    need(blob[:4] == hashlib.sha256(origin.encode() + b"\n\x01" + writer).digest()[:4], "key hash")
    check_signature(writer, blob[4:], said.encode())
    return {"root": root.hex(), "epsilon": float(ledger.epsilon), "delta": float(ledger.delta), "writer": writer.hex(),
            "claims": [float(p["claim"]) for p in ledger.portfolios if p["claim"] is not None],
            "charged": {name: run["charged"] for name, run in ledger.runs.items()}, "owner": ledger.owners[-1].hex(),
            "noise": {name: run["noise"] for name, run in ledger.runs.items() if run["noise"]}}
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        print(json.dumps(verify(file.read(), bytes.fromhex(sys.argv[2]))))
