// The one script tag of a site:  <script src="https://desk.example/widget.js" async></script>
// Options, as attributes: data-language, data-identity (a JSON web token of the site's server), data-open.
// It is a plain script, so that it may come from another origin; the rest are modules.

(() => {
  const { src, dataset } = document.currentScript;
  const base = new URL(".", src);
  import(new URL("widget/static/widget.js", base)).then(({ mount }) => mount(base, dataset));
})();
