// Opens a checkpoint with the pinned verifier key and finds a leaf in its tree, with
// @sigstore/verify; prints size and root as JSON.

import { createPublicKey } from "node:crypto";
import { readFileSync } from "node:fs";
import { verifyCheckpoint } from "@sigstore/verify/dist/tlog/checkpoint.js";
import { verifyMerkleInclusion } from "@sigstore/verify/dist/tlog/merkle.js";

const { vkey, note, leaf, index, proof } = JSON.parse(readFileSync(0, "utf8"));
const [, name, keyId, encoded] = vkey.match(/^([^+]+)\+([0-9a-f]{8})\+(.+)$/);
const x = Buffer.from(encoded, "base64").subarray(1).toString("base64url");
const log = {
  baseURL: name,
  logID: Buffer.from(keyId, "hex"),
  publicKey: createPublicKey({ format: "jwk", key: { kty: "OKP", crv: "Ed25519", x } }),
};
const entry = {
  canonicalizedBody: Buffer.from(leaf, "base64"),
  inclusionProof: {
    logIndex: index,
    hashes: proof.map((hash) => Buffer.from(hash, "base64")),
    checkpoint: { envelope: note },
  },
};
const checkpoint = verifyCheckpoint(entry, [log]);
verifyMerkleInclusion(entry, checkpoint);
console.log(
  JSON.stringify({
    origin: checkpoint.origin,
    size: Number(checkpoint.logSize),
    root: checkpoint.logHash.toString("base64"),
  }),
);
