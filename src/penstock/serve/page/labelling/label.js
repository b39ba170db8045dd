// The labelling room: who comes in, and which view they see. A labeller sees items to rank (judging.js), the owner the
// room too (room.js).

import { label, listen, session } from "../api.js";
import { $, toast } from "../dom.js";
import { next, startJudging } from "./judging.js";
import { startRoom } from "./room.js";

const REMEMBERED = "penstock.remembered"; // as on the page to chat in

async function start() {
  const given = /^#(?:token|key)=(.+)$/.exec(location.hash)?.[1]; // the link that the owner hands out
  if (given) {
    history.replaceState(null, "", location.pathname);
    return logIn(decodeURIComponent(given));
  }
  if (!localStorage.getItem(REMEMBERED)) return askForToken();
  try {
    await session.resume();
  } catch (error) {
    return askForToken(error.status === 401 ? "" : error.message);
  }
  return enter();
}

function askForToken(message = "") {
  $("app").hidden = true;
  $("login").hidden = false;
  $("login-error").textContent = message;
  $("token").focus();
}

async function logIn(token) {
  try {
    await session.open(token);
  } catch (error) {
    return askForToken(error.status === 401 ? "That is no token of this room. Ask its owner for a new one." : error.message);
  }
  localStorage.setItem(REMEMBERED, "yes");
  $("token").value = "";
  return enter();
}

async function enter() {
  await guard(async () => {
    const me = await label.me();
    $("login").hidden = true;
    $("app").hidden = false;
    $("name").textContent = me.name;
    $("views").hidden = !me.owner;
    if (me.owner) {
      $("show-room").onclick = () => view("room", () => startRoom(guard));
      $("show-judging").onclick = () => view("judging", async () => startJudging(guard, await label.me()));
      return $("show-room").click();
    }
    view("judging", () => startJudging(guard, me));
  });
}

function view(name, draw) {
  for (const id of ["judging", "room"]) {
    $(id).hidden = id !== name;
    $(`show-${id}`).setAttribute("aria-pressed", String(id === name));
  }
  $("progress-words").textContent = "";
  return guard(draw);
}

/** Runs a function that calls the server, and shows its error. Returns whether it succeeded. */
async function guard(action) {
  try {
    await action();
    return true;
  } catch (error) {
    if (error.status === undefined) throw error;
    if (error.status !== 0 && error.status !== 401) toast(error.message);
    return false;
  }
}

let probing = 0;

function setReachable(reachable) {
  $("banner").textContent = reachable ? "" : "The server cannot be reached. What you have done here is kept in this tab.";
  $("banner").hidden = reachable;
  if (reachable) clearInterval(probing);
  else if (!probing) probing = setInterval(() => session.resume().catch(() => {}), 2000);
  if (reachable) probing = 0;
}

listen({ signedOut: () => askForToken("Please come in again."), reachable: setReachable });
$("login-form").onsubmit = (event) => {
  event.preventDefault();
  logIn($("token").value.trim());
};
$("log-out").onclick = async () => {
  await guard(session.close);
  localStorage.removeItem(REMEMBERED);
  location.reload();
};
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !$("judging").hidden && $("item").hidden) next(); // nothing was left: look again
});

start();
