// Sets formulas by KaTeX, which comes with the site; notebooks have theirs between dollars.
document$.subscribe(({ body }) => {
  renderMathInElement(body, {
    delimiters: [
      { left: '$$', right: '$$', display: true },
      { left: '$', right: '$', display: false },
      { left: '\\(', right: '\\)', display: false },
      { left: '\\[', right: '\\]', display: true },
    ],
    throwOnError: true,
  });
});
