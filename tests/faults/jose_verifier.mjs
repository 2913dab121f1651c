// A verifier of its own, as a service runs one: jose. Speaks as verifier_process.py does.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

// Its packages are those that tests/interop locks.
const interop = createRequire(new URL("../interop/node/", import.meta.url));
const { createRemoteJWKSet, jwtVerify } = await import(interop.resolve("jose"));

let verify;
for await (const line of createInterface({ input: process.stdin })) {
  if (verify === undefined) {
    const { issuer, audience, jwks_max_age, skew } = JSON.parse(line);
    // It has to be told how long to cache; all else is as it comes.
    const keys = createRemoteJWKSet(new URL(`${issuer}/.well-known/jwks.json`), {
      cacheMaxAge: jwks_max_age * 1000,
    });
    const options = {
      issuer, audience, typ: "at+jwt", algorithms: ["RS256"], clockTolerance: skew,
    };
    verify = (token) => jwtVerify(token, keys, options);
    continue;
  }
  const answer = await verify(line).then(() => "", (error) => `${error.code}: ${error.message}`);
  process.stdout.write(`${answer.replaceAll("\n", " ")}\n`);
}
