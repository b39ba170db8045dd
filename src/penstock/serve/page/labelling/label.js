// The labelling room: who comes in, and which view they see. A labeller sees items to rank (judging.js), the owner the
// room too (room.js).

import { label, listen, session } from "../api.js";
import { $ } from "../dom.js";
import { askForKey, guard, logOut, showApp, startLogin } from "../login.js";
import { next, startJudging } from "./judging.js";
import { startRoom } from "./room.js";

async function enter() {
  await guard(async () => {
    const me = await label.me();
    showApp();
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

let probing = 0;

function setReachable(reachable) {
  $("banner").textContent = reachable ? "" : "The server cannot be reached. What you have done here is kept in this tab.";
  $("banner").hidden = reachable;
  if (reachable) clearInterval(probing);
  else if (!probing) probing = setInterval(() => session.resume().catch(() => {}), 2000);
  if (reachable) probing = 0;
}

listen({ signedOut: () => askForKey("Please come in again."), reachable: setReachable });
$("log-out").onclick = async () => {
  await logOut();
  location.reload();
};
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !$("judging").hidden && $("item").hidden) next(); // nothing was left: look again
});

startLogin({ field: "token", wrong: "That is no token of this room. Ask its owner for a new one.", enter });
