// promptfoo's providers for completions and chats, each in an evaluation of two prompts.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { KEY, MODEL, PROMPT, V1, assert, works } from "./checks.mjs";

for (const kind of ["completion", "chat"]) {
  await works(`${kind}s`, async () => {
    const folder = mkdtempSync(join(tmpdir(), "promptfoo-"));
    const provider = {
      id: `openai:${kind}:${MODEL}`,
      config: { apiBaseUrl: V1, apiKey: KEY, max_tokens: 8 },
    };
    const tests = ["fox", "hare"].map((animal) => ({
      vars: { animal }, assert: [{ type: "javascript", value: "output.length > 0" }],
    }));
    const config = { prompts: [`${PROMPT} the {{animal}}`], providers: [provider], tests };
    writeFileSync(join(folder, "config.json"), JSON.stringify(config));
    execFileSync(
      join("node_modules", ".bin", "promptfoo"),
      ["eval", "-c", join(folder, "config.json"), "-o", join(folder, "out.json"), "--no-cache",
        "--no-write", "--no-progress-bar"],
      { stdio: "inherit", env: { ...process.env, PROMPTFOO_CONFIG_DIR: folder }, timeout: 240_000 },
    );
    const { stats } = JSON.parse(readFileSync(join(folder, "out.json"))).results;
    assert(stats.successes === 2 && stats.failures + stats.errors === 0, JSON.stringify(stats));
  });
}
