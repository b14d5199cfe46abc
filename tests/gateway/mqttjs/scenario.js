"use strict";
// What an app does with MQTT.js, the same in Node and in a browser. It says what it saw with `report`, and the test
// decides whether that is right; where it says "ready", the test does something that it then waits for.

async function scenario(mqtt, task, report) {
  const v5 = task.version === 5;

  function connect(name, options = {}) {
    const session = v5 && options.clean === false ? { properties: { sessionExpiryInterval: 3600 } } : {};
    const client = mqtt.connect(task.url, {
      clientId: `${task.name}-${name}`, username: task.username, password: task.password,
      protocolVersion: task.version, reconnectPeriod: 50, ...session, ...options,
    });
    client.inbox = [];
    client.on("message", (topic, payload, packet) => {
      const seen = { topic, payload: payload.toString(), qos: packet.qos, retain: packet.retain };
      if (packet.properties) seen.properties = readable(packet.properties);
      client.inbox.push(seen);
      client.emit("inbox");
    });
    return new Promise((resolve, reject) => {
      client.once("error", reject);
      client.once("connect", (connack) => resolve([client, connack.sessionPresent]));
    });
  }

  function readable(properties) {
    const { correlationData, ...plain } = properties;
    return correlationData ? { ...plain, correlationData: new TextDecoder().decode(correlationData) } : plain;
  }

  async function received(client, number) {
    while (client.inbox.length < number) await new Promise((next) => client.once("inbox", next));
    return client.inbox.splice(0, number);
  }

  const [listener] = await connect("listener", { clean: false });
  await report("ready for a push");
  await report("push", await received(listener, 1));

  const [talker] = await connect("talker");
  const filters = { "talk/0": { qos: 0 }, "talk/1": { qos: 1 }, "talk/2": { qos: 2 } };
  await report("granted", await listener.subscribeAsync(filters));
  const properties = v5 ? {
    userProperties: { a: ["1", "2"], b: "3" }, contentType: "text/plain", responseTopic: "answers",
    correlationData: new TextEncoder().encode("id"), payloadFormatIndicator: true, messageExpiryInterval: 86400,
  } : undefined;
  for (const qos of [0, 1, 2]) {
    for (let i = 0; i < 10; i++) await talker.publishAsync(`talk/${qos}`, `${i}`, { qos, properties });
  }
  await report("talk", await received(listener, 30));

  await talker.publishAsync("kept", "for later", { qos: 1, retain: true });
  await listener.subscribeAsync("kept", { qos: 1 });
  await report("retained", await received(listener, 1));
  await talker.publishAsync("kept", "", { qos: 1, retain: true });
  await received(listener, 1);

  const [mortal] = await connect("mortal", { will: { topic: "talk/1", payload: "it died", qos: 1 } });
  mortal.end(true); // closes the socket without DISCONNECT
  await report("will", await received(listener, 1));

  await listener.endAsync();
  for (const qos of [0, 1, 2]) await talker.publishAsync(`talk/${qos}`, "meanwhile", { qos });
  const [again, present] = await connect("listener", { clean: false });
  await report("resumed", { present, messages: await received(again, 2) });

  // A client with a clean session subscribes again by itself when it comes back.
  await talker.subscribeAsync("talk/2", { qos: 2 });
  const back = new Promise((next) => talker.once("close", () => talker.once("connect", next)));
  await report("ready for a restart");
  await back;
  await talker.publishAsync("talk/2", "after the restart", { qos: 2 });
  await report("resubscribed", await received(talker, 1));
  await Promise.all([again.endAsync(), talker.endAsync()]);
  await report("done");
}

async function run(mqtt, base) {
  let last = "nothing";
  const report = async (step, seen = null) => {
    last = step;
    await fetch(`${base}/report`, { method: "POST", body: JSON.stringify({ step, seen }) });
  };
  try {
    await scenario(mqtt, await (await fetch(`${base}/task`)).json(), report);
  } catch (error) {
    await report("failed", `after "${last}": ${error.stack || error}`);
  }
}

if (typeof module !== "undefined") module.exports = { run };
