// Opens the page of examples/browser in Chromium and tells what it saw:
//   node browser.mjs CHROMIUM URL PROMPT SCREENSHOT > seen.json
//
// seen: {lengths, text, rate, status, model, requests, errors}; lengths is how long the continuation was at each look at it.

import { chromium } from "playwright-core";

const [executablePath, url, prompt, screenshot] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath,
  args: [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
try {
  const page = await browser.newPage({ viewport: { width: 1000, height: 860 } });
  const [requests, errors, lengths] = [[], [], []];
  page.on("request", (request) => requests.push(request.url()));
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));

  await page.goto(url);
  await page.waitForSelector(':not([data-state="loading"])#page');
  await page.fill("#temperature", "0");
  await page.fill("#prompt", "");
  await page.locator("#prompt").pressSequentially(prompt, { delay: 20 });
  const text = () => page.textContent("#continuation");
  while ((await page.getAttribute("#page", "data-state")) === "writing") lengths.push((await text()).length);
  const seen = {
    lengths,
    text: await text(),
    rate: await page.textContent("#rate"),
    status: await page.textContent("#status"),
    model: await page.innerText("#model"),
    requests,
    errors,
  };
  await page.screenshot({ path: screenshot });
  process.stdout.write(JSON.stringify(seen));
} finally {
  await browser.close();
}
