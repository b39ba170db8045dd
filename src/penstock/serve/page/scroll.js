// Whether the screen follows an answer that grows: until somebody scrolls up, be it by a line, and again from the end on.

import { $ } from "./dom.js";

let following = true;
let last = 0; // scrollTop at the last event, or where toEnd put it

const rest = ({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight;

/** moved(): after every movement. */
export function startScroll(moved) {
  const scroll = $("scroll");
  scroll.onscroll = () => {
    const { scrollTop } = scroll;
    if (scrollTop !== last) {
      if (rest(scroll) <= 8) following = scrollTop > last || rest(scroll) <= 1; // 1: the text has become shorter
      else if (scrollTop < last) following = false;
      last = scrollTop;
    }
    moved();
  };
  new ResizeObserver(keepUp).observe(scroll); // a phone's keyboard, a longer message
}

export const farFromEnd = () => rest($("scroll")) > 80;

export function toEnd() {
  const scroll = $("scroll");
  following = true;
  scroll.scrollTop = scroll.scrollHeight;
  last = scroll.scrollTop;
}

/** To be called when the text has grown. */
export function keepUp() {
  if (following) toEnd();
}
