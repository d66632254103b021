// The operations guide's own client, as its memory service uses it: one JSON command a line on
// stdin, one JSON answer a line on stdout.
import { createInterface } from "node:readline";
import { createClient } from "redis";

const PREFIX = "claude-flow:memory:";
const client = createClient({ url: process.argv[2] });
await client.connect();

const commands = {
  async get({ key }) {
    const data = await client.get(PREFIX + key);
    return data === null ? null : JSON.parse(data);
  },
  async set({ key, value, ttl }) {
    const now = new Date().toISOString();
    const entry = JSON.stringify({ value, createdAt: now, updatedAt: now });
    await client.set(PREFIX + key, entry, { EX: ttl });
    return now;
  },
  async keys({ pattern }) {
    const found = [];
    for await (const page of client.scanIterator({ MATCH: PREFIX + pattern })) {
      found.push(...[page].flat());
    }
    return found;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...args } = JSON.parse(line);
  console.log(JSON.stringify(await commands[command](args)));
}
client.destroy();
