// Runs before the page is painted, so that a dark page never flashes white.
document.documentElement.dataset.theme = localStorage.getItem("penstock.theme") ?? "system";
