// Discovers the authority, gets an access token and validates it as a resource server would
// (RFC 9068), all with oauth4webapi; prints the token endpoint's answer and the claims as JSON.

import { readFileSync } from "node:fs";
import * as oauth from "oauth4webapi";

const given = JSON.parse(readFileSync(0, "utf8"));
const insecure = { [oauth.allowInsecureRequests]: true }; // the authority is on loopback

const issuer = new URL(given.issuer);
const discovery = await oauth.discoveryRequest(issuer, { algorithm: "oauth2", ...insecure });
const server = await oauth.processDiscoveryResponse(issuer, discovery);

const client = { client_id: given.clientId };
const authentication = oauth[given.method](given.clientSecret);
const parameters = { scope: given.scope, resource: given.audience };
const response = await oauth.clientCredentialsGrantRequest(
  server, client, authentication, parameters, insecure,
);
const answer = await oauth.processClientCredentialsResponse(server, client, response);

const headers = { authorization: `Bearer ${answer.access_token}` };
const request = new Request(given.audience, { headers });
const claims = await oauth.validateJwtAccessToken(server, request, given.audience, insecure);
console.log(JSON.stringify({ answer, claims }));
