// node node.cjs <path of the mqtt package> <base address of the test>
const [mqtt, base] = process.argv.slice(2);
require("./scenario.js").run(require(mqtt), base);
