// What the server is asked, and its errors as sentences for people.

/** An error that can be read by whoever uses the page. */
export class Problem extends Error {}

async function sentence(answer) {
  if (answer.status === 429) {
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    return `The server is busy. Try again in ${seconds} second${seconds === 1 ? "" : "s"}.`;
  }
  const body = await answer.json().catch(() => ({}));
  return typeof body.error === "string" ? body.error : `The server answered with status ${answer.status}.`;
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running? `make explore` starts it.");
  }
  if (!answer.ok) throw new Problem(await sentence(answer));
  return answer;
}

const post = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** JSON of a GET; parameters that are empty are left out. */
export async function get(path, parameters = {}, signal = undefined) {
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return (await ask(query ? `${path}?${query}` : path, { signal })).json();
}

/** JSON of a POST of JSON. */
export async function send(path, body, signal = undefined) {
  return (await ask(path, post(body, signal))).json();
}

/** Events of a POST as they come (text/event-stream). Ends with the connection, whoever ends that. */
export async function* events(path, body, signal) {
  const answer = await ask(path, post(body, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Problem("The connection to the server broke off.");
    });
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield JSON.parse(lines.map((line) => line.slice(5)).join("\n"));
    }
  }
}
