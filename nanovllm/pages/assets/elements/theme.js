// A classic script in the head: sets data-theme on the root before the first paint.
{
  const key = "nanovllm-theme";
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");

  /** Return the theme that the reader chose, or null for the system's. */
  const chosen = () => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // storage may be forbidden
    }
  };
  const apply = () => {
    const theme = chosen() ?? (systemDark.matches ? "dark" : "light");
    root.dataset.theme = theme === "dark" ? "dark" : "light";
    document.dispatchEvent(new Event("themechange"));
  };
  systemDark.addEventListener("change", apply);
  document.addEventListener("themechoice", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(key, root.dataset.theme);
    } catch {
      // The choice then lasts until the page is closed.
    }
    document.dispatchEvent(new Event("themechange"));
  });
  apply();
}
