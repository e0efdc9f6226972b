// To reveal.js every <section> is a slide, also one inside a figure: figures get a <div> instead.
(() => {
  const create = document.createElement.bind(document);
  document.createElement = (tag, ...rest) => create(tag === "section" ? "div" : tag, ...rest);
})();
