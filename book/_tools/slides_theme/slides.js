// Lets each slide fit its height: smaller by steps to 60 %, then it scrolls. Figures keep their keys.
(() => {
  const HEIGHT = 720, SMALLEST = 0.6;
  function fit(slide) {
    if (!slide || slide.classList.contains("fitted")) return;
    let size = 1;
    while (slide.scrollHeight > HEIGHT && size > SMALLEST) {
      size -= 0.04;
      slide.style.fontSize = `${size}em`;
      for (const image of slide.querySelectorAll("img")) image.style.maxHeight = `${560 * size}px`;
    }
    slide.classList.add("fitted");
  }
  const current = () => fit(Reveal.getCurrentSlide());
  Reveal.on("ready", async () => {
    for (const figure of document.querySelectorAll(".mn-fig")) {
      figure.addEventListener("keydown", (event) => event.stopPropagation());
      figure.dataset.preventSwipe = "";
    }
    await window.MathJax?.startup?.promise;
    current();
    Reveal.on("slidechanged", current);
  });
})();
