// A human portal: oidc-provider on loopback, with one client and accounts whose claims its standard
// input sets and sets again, a JSON object a line; prints a line once each is in force.

import { createInterface } from "node:readline";
import Provider from "oidc-provider";

console.info = console.warn; // its notices, too: standard output is for whoever sets the accounts
const [port, redirectUri, clientSecret] = process.argv.slice(2);
let accounts = {};

const configuration = {
  clients: [
    {
      client_id: "privyseal",
      redirect_uris: [redirectUri],
      grant_types: ["authorization_code"],
      response_types: ["code"],
      client_secret: clientSecret,
      token_endpoint_auth_method: "client_secret_basic",
      id_token_signed_response_alg: "RS256",
    },
  ],
  claims: {
    openid: ["sub", "privyseal_scopes"],
    profile: ["name", "preferred_username"],
    email: ["email"],
  },
  conformIdTokenClaims: false, // so that what the scopes ask for stands in the ID token
  pkce: { required: () => true },
  features: { devInteractions: { enabled: true } },
  findAccount: (_, id) => accounts[id] && {
    accountId: id,
    claims: () => ({ sub: id, ...accounts[id] }),
  },
};

const provider = new Provider(`http://localhost:${port}`, configuration);
const server = provider.listen(Number(port), "127.0.0.1");
server.once("listening", () => {
  createInterface({ input: process.stdin })
    .on("line", (line) => {
      accounts = JSON.parse(line);
      console.log("set");
    })
    .on("close", () => process.exit());
});
