// Sorts the table by a click on a heading; rows without a figure stay last.
document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  var heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach(function (head, at) {
    head.querySelector("button").addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var rows = Array.from(body.rows);
      rows.sort(function (a, b) {
        var x = a.cells[at].dataset.value, y = b.cells[at].dataset.value;
        if (x === "" || y === "") { return (x === "") - (y === ""); }
        var order = at === 0 ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
        return up ? order : -order;
      });
      rows.forEach(function (row) { row.classList.remove("first"); body.appendChild(row); });
    });
  });
});

// Says what a mark of a drawing is: under the pointer, and by the arrow keys in a drawing that has the focus.
var tips = (function () {
  var box = document.createElement("div");
  var current = null;
  box.className = "tip";
  box.setAttribute("role", "status");
  document.body.appendChild(box);

  function hide() {
    if (current) { current.classList.remove("here"); }
    current = null;
    box.textContent = "";
  }

  function show(mark) {
    hide();
    current = mark;
    mark.classList.add("here");
    box.textContent = mark.dataset.tip;
    var at = mark.getBoundingClientRect(), own = box.getBoundingClientRect();
    var left = Math.min(Math.max(at.left + at.width / 2 - own.width / 2, 8), document.documentElement.clientWidth - own.width - 8);
    var above = at.top - own.height - 10;
    box.style.left = Math.max(left, 8) + "px";
    box.style.top = (above < 8 ? at.bottom + 10 : above) + "px";
  }

  // Takes the browser's own tooltips out of a drawing and offers them here instead.
  function adopt(svg) {
    svg.querySelectorAll("title").forEach(function (title) {
      title.parentNode.setAttribute("data-tip", title.textContent);
      title.remove();
    });
    if (svg.querySelector("[data-tip]")) { svg.setAttribute("tabindex", "0"); svg.setAttribute("aria-roledescription", "drawing; arrow keys walk along its marks"); }
  }

  function step(svg, by) {
    var marks = Array.from(svg.querySelectorAll("[data-tip]")).filter(function (mark) { return mark.getClientRects().length > 0; });
    var at = marks.indexOf(current);
    if (marks.length) { show(marks[at < 0 ? (by > 0 ? 0 : marks.length - 1) : (at + by + marks.length) % marks.length]); }
  }

  document.addEventListener("pointerover", function (event) {
    var mark = event.target.closest && event.target.closest("[data-tip]");
    if (mark) { show(mark); } else { hide(); }
  });
  document.addEventListener("keydown", function (event) {
    var svg = event.target.closest && event.target.closest("svg");
    var by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") { hide(); }
    if (svg && by) { event.preventDefault(); step(svg, by); }
  });
  document.addEventListener("focusout", hide);
  window.addEventListener("scroll", hide, { passive: true });
  document.querySelectorAll("svg").forEach(adopt);
  return { adopt: adopt, hide: hide };
})();
