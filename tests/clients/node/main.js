// node main.js FILE FUNCTION: calls the function with the arguments on standard input, a JSON array, and prints the result.
import { json } from 'node:stream/consumers'

const [file, name] = process.argv.slice(2)
const { [name]: call } = await import(`./${file}`)
const result = await call(...(await json(process.stdin)))
process.stdout.write(JSON.stringify(result ?? null))
