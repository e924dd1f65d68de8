// The connection to one world, behind a WebSocket (server.py) or in a Worker (local.js). Both take
// the same questions and answer each one, in order.

export function connect(number, play) {
  const questions = []; // not answered yet, oldest first
  let port, closed = "";

  const settle = (reply) => {
    const question = questions.shift();
    if (!question) closed = reply.error ?? ""; // a refusal before anything was asked
    else if (reply.error === undefined) question.resolve(reply);
    else question.reject(new Error(reply.error));
  };
  const receive = (data) => {
    if (typeof data === "string") return settle(JSON.parse(data));
    settle({ number: new DataView(data).getUint32(0, true), frame: new Uint8Array(data, 4) });
  };
  const end = (reason) => {
    closed ||= reason;
    while (questions.length) settle({ error: closed });
  };

  const opened = new Promise((resolve) => {
    if (play === "socket") {
      port = new WebSocket(new URL(`socket/${number}`, location.href.replace(/^http/, "ws")));
      port.binaryType = "arraybuffer";
      port.onopen = resolve;
      port.onmessage = (event) => receive(event.data);
      port.onclose = (event) => {
        end(event.reason || "the server is gone; reload the page when it is back");
        resolve();
      };
    } else {
      port = new Worker(`local.js?world=${number}`, { type: "module" });
      port.onmessage = (event) => receive(event.data);
      port.onerror = (event) => end(event.message || "this browser cannot run the world");
      resolve();
    }
  });

  return {
    // question: an object as listed in server.py, or the bytes of a picture.
    // → a promise of { number, frame } or { run }.
    async ask(question) {
      await opened;
      if (closed) throw new Error(closed);
      return new Promise((resolve, reject) => {
        questions.push({ resolve, reject });
        const data = question instanceof Uint8Array ? question : JSON.stringify(question);
        play === "socket" ? port.send(data) : port.postMessage(data);
      });
    },
    close() {
      play === "socket" ? port.close() : port.terminate();
      end("closed");
    },
  };
}
