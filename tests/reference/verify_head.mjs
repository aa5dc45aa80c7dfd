// Verifies an exported ledger's head and envelopes with nothing but Node: node verify_head.mjs EXPORT OWNER_HEX
// Written from docs/ledger-format.md. Prints one JSON object; exits with 1 where anything does not hold.
import { createHash, createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";

const sha = (...parts) => createHash("sha256").update(Buffer.concat(parts)).digest();
const PREFIX = Buffer.from("302a300506032b6570032100", "hex"); // SubjectPublicKeyInfo of Ed25519 (RFC 8410)
const keyOf = (raw) => createPublicKey({ key: Buffer.concat([PREFIX, raw]), format: "der", type: "spki" });
function need(condition, why) {
  if (!condition) throw new Error(why);
}

function rootOf(leaves) {
  if (leaves.length === 1) return leaves[0];
  let split = 1;
  while (split * 2 < leaves.length) split *= 2;
  return sha(Buffer.of(1), rootOf(leaves.slice(0, split)), rootOf(leaves.slice(split)));
}

// Keys of printable ASCII sort by code unit, as RFC 8785 demands, and JSON.stringify escapes as it does.
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const members = Object.keys(value).sort().map((name) => `${JSON.stringify(name)}:${canonical(value[name])}`);
  return `{${members.join(",")}}`;
}

function payloadOf(line, type, owner) {
  const envelope = JSON.parse(line);
  need(canonical(envelope) === line, "an envelope is not canonical");
  need(envelope.payloadType === type && envelope.signatures.length === 1, "an envelope of another kind");
  const payload = Buffer.from(envelope.payload, "base64");
  const pae = Buffer.concat([Buffer.from(`DSSEv1 ${type.length} ${type} ${payload.length} `), payload]);
  const [{ keyid, sig }] = envelope.signatures;
  need(keyid === sha(owner).toString("hex"), "an envelope of another key");
  need(verify(null, pae, keyOf(owner), Buffer.from(sig, "base64")), "the owner's signature");
  return payload;
}

function main(file, ownerHex) {
  const lines = readFileSync(file, "utf8").split("\n");
  need(lines.pop() === "", "the export does not end with a line feed");
  const note = Buffer.from(JSON.parse(lines.pop()).note, "base64").toString("utf8");
  const owner = Buffer.from(ownerHex, "hex");
  const leaves = [];
  let [genesis, envelopes] = [null, 0];
  while (lines.length) {
    const line = lines.shift(), record = JSON.parse(line);
    need(canonical(record) === line && record.seq === leaves.length, `record ${leaves.length}`);
    const last = leaves.length ? leaves[leaves.length - 1].toString("hex") : "0".repeat(64);
    need(record.prev === last, "the chain");
    genesis ??= record;
    leaves.push(sha(Buffer.of(0), Buffer.from(line)));
    if (["genesis", "portfolio", "plan"].includes(record.type)) {
      const type = record.type === "plan" ? "application/vnd.in-toto+json" : "application/vnd.dpbudget.record.v1+json";
      const payload = payloadOf(lines.shift(), type, owner);
      const said = record.type === "plan" ? sha(payload).toString("hex") : payload.toString();
      need(said === (record.statement ?? line), `the envelope of a ${record.type} holds something else`);
      envelopes += 1;
    }
  }
  const [text, signatureLine] = note.split("\n\n");
  const [origin, size, root] = text.split("\n");
  const [, name, blob] = signatureLine.trimEnd().split(" ");
  const writer = Buffer.from(genesis.writer, "hex");
  const signature = Buffer.from(blob, "base64");
  need(genesis.owner === ownerHex, "another owner");
  need(origin === `dpbudget.ledger/${leaves[0].toString("hex").slice(0, 16)}` && name === origin, "another origin");
  need(Number(size) === leaves.length && root === rootOf(leaves).toString("base64"), "size or root of the head");
  need(signature.subarray(0, 4).equals(sha(Buffer.from(`${name}\n\x01`), writer).subarray(0, 4)), "the key hash");
  need(verify(null, Buffer.from(`${text}\n`), keyOf(writer), signature.subarray(4)), "the writer's signature");
  return { size: leaves.length, root: rootOf(leaves).toString("hex"), envelopes };
}

try {
  console.log(JSON.stringify(main(process.argv[2], process.argv[3])));
} catch (error) {
  console.log(JSON.stringify({ refused: error.message }));
  process.exitCode = 1;
}
