// Verifies an access token with jose; prints its header and claims as JSON.

import { readFileSync } from "node:fs";
import { createRemoteJWKSet, jwtVerify } from "jose";

const { jwksUri, issuer, audience, accessToken } = JSON.parse(readFileSync(0, "utf8"));
const keys = createRemoteJWKSet(new URL(jwksUri));
const { protectedHeader, payload } = await jwtVerify(accessToken, keys, {
  issuer,
  audience,
  typ: "at+jwt",
  algorithms: ["RS256"],
  requiredClaims: ["sub", "client_id", "iat", "exp", "jti", "scope"],
});
console.log(JSON.stringify({ header: protectedHeader, claims: payload }));
