// Coming in, on every page: by a link that carries the key, by the session that this browser has, or by the form.

import { session } from "./api.js";
import { $, toast } from "./dom.js";

const REMEMBERED = "penstock.remembered"; // this browser logged in before: ask the server before asking for the key
let words = {};
let input = null;

/** field: the input of the form; wrong: what is said of a key that is none; enter: called when somebody is in. */
export function startLogin({ field, wrong, enter }) {
  words = { wrong, enter };
  input = $(field);
  $("login-form").onsubmit = (event) => {
    event.preventDefault();
    logIn(input.value.trim());
  };
  return begin();
}

async function begin() {
  const given = /^#(?:key|token)=(.+)$/.exec(location.hash)?.[1]; // the address that is handed out may carry it
  if (given) {
    history.replaceState(null, "", location.pathname);
    return logIn(decoded(given));
  }
  if (!localStorage.getItem(REMEMBERED)) return askForKey();
  try {
    await session.resume();
  } catch (error) {
    return askForKey(error.status === 401 ? "" : error.message);
  }
  return words.enter();
}

/** A link that was cut or typed may hold a stray percent sign. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

async function logIn(key) {
  try {
    await session.open(key);
  } catch (error) {
    return askForKey(error.status === 401 ? words.wrong : error.message);
  }
  localStorage.setItem(REMEMBERED, "yes");
  input.value = "";
  return words.enter();
}

export function askForKey(message = "") {
  $("app").hidden = true;
  $("login").hidden = false;
  $("login-error").textContent = message;
  input.focus();
}

export function showApp() {
  $("login").hidden = true;
  $("app").hidden = false;
}

export async function logOut() {
  await guard(session.close);
  localStorage.removeItem(REMEMBERED);
}

/** Runs a function that calls the server, and shows its error. Returns whether it succeeded. */
export async function guard(action) {
  try {
    await action();
    return true;
  } catch (error) {
    if (error.status === undefined) throw error;
    if (error.status !== 0 && error.status !== 401) toast(error.retryAfter ? `${error.message} Try again in ${error.retryAfter} s.` : error.message);
    return false;
  }
}
