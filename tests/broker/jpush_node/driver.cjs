// Makes the calls that the test writes to stdin, one JSON object a line, with an unmodified SDK; answers each with a
// line that begins with "answer ": the SDKs print as well.
// Arguments: the SDK's folder, and the options of its client as JSON.
//
// A call: {"chain": [["push"], ["setPlatform", "all"], …, ["send"]]}, each a method and its arguments; the last one takes a
// callback. {"$": ["tag", "red"]} stands for JPush.tag("red").
const sdk = require(process.argv[2])
const JPush = sdk.JPush || sdk
const client = JPush.buildClient(JSON.parse(process.argv[3]))

function read (value) {
  if (Array.isArray(value)) return value.map(read)
  return value && value.$ ? JPush[value.$[0]](...value.$.slice(1)) : value
}

function answer (error, result) {
  const told = error && { name: error.name, status: error.httpCode, body: error.response, message: error.message }
  process.stdout.write('answer ' + JSON.stringify(error ? { error: told } : { result }) + '\n')
}

function call (chain) {
  const last = chain.pop()
  let target = client
  for (const [name, ...args] of chain) target = target[name](...read(args))
  target[last[0]](...read(last.slice(1)), answer)
}

require('readline').createInterface({ input: process.stdin }).on('line', line => {
  try {
    call(JSON.parse(line).chain)
  } catch (error) {
    answer(error)
  }
})
